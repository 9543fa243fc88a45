"""file:// passes the suite; and what only files can get wrong."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from objectstore.suite import KEY, ObjectStoreSuite, names, read

from kvstore_s3.config import Settings
from kvstore_s3.errors import BitstreamFault, DamagedObjectError, StoreRefusedError, StoreUnavailableError
from kvstore_s3.objectstore.base import ObjectInfo, ObjectStore
from kvstore_s3.objectstore.open import open_store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "made" / "by the store"


@pytest.fixture
async def store(root: Path) -> AsyncIterator[ObjectStore]:
    store = open_store(root.as_uri(), Settings())
    yield store
    await store.close()


def files_below(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]


class TestLocalStore(ObjectStoreSuite):
    pass


@pytest.mark.parametrize("umask", [0, 0o077])
async def test_files_and_directories_are_private_whatever_the_umask(store: ObjectStore, root: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        await store.put(KEY, b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((root / KEY).stat().st_mode) == 0o600
    made = [root.parent, root, root / ".tmp", *(root / parent for parent in Path(KEY).parents)]
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o700}


async def test_nothing_but_the_object_is_left_after_a_put(store: ObjectStore, root: Path) -> None:
    await store.put("a/b", b"x")
    await store.put("a/b", b"y")
    await store.put("a/b", b"z", replace=True)
    assert files_below(root) == ["a/b"]


async def test_probing_and_reading_create_nothing(store: ObjectStore, tmp_path: Path) -> None:
    await store.probe()
    assert await store.head(KEY) is None
    assert await names(store.list()) == []
    await store.delete(KEY)
    assert os.listdir(tmp_path) == []


async def test_deleting_removes_the_directories_that_it_empties(store: ObjectStore, root: Path) -> None:
    await store.put("a/b/c", b"x")
    await store.put("a/d", b"x")
    await store.delete("a/b/c")
    assert os.listdir(root / "a") == ["d"]
    await store.delete("a/d")
    assert os.listdir(root) == [".tmp"]


async def test_puts_survive_deletes_that_remove_their_directories(store: ObjectStore) -> None:
    async def put_and_delete(number: int) -> None:
        for _ in range(50):
            assert await store.put(f"a/b/{number}", b"x")
            await store.delete(f"a/b/{number}")

    await asyncio.gather(*(put_and_delete(number) for number in range(4)))


async def test_a_link_to_a_file_is_no_object(store: ObjectStore, root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    await store.put("a/b", b"x")
    (root / "a/link").symlink_to(tmp_path / "outside")
    for attempt in (store.head("a/link"), read(store, "a/link", 0, 6)):
        with pytest.raises(DamagedObjectError, match="symbolic link"):
            await attempt
    with pytest.raises(StoreRefusedError, match="symbolic link"):
        await store.put("a/link", b"x")
    assert await names(store.list()) == ["a/b"]
    assert (tmp_path / "outside").read_bytes() == b"secret"


async def test_a_link_to_a_directory_is_not_followed(store: ObjectStore, root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(b"secret")
    await store.put("a/b", b"x")
    (root / "link").symlink_to(tmp_path / "outside")
    for attempt in (store.head("link/file"), read(store, "link/file", 0, 6)):
        with pytest.raises(DamagedObjectError, match="symbolic link"):
            await attempt
    with pytest.raises(StoreRefusedError, match="symbolic link"):
        await store.put("link/new", b"x")
    assert await names(store.list()) == ["a/b"]
    assert os.listdir(tmp_path / "outside") == ["file"]


async def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    store = open_store((tmp_path / "cache").as_uri(), Settings())
    await store.put(KEY, b"x")
    await store.close()
    assert (tmp_path / "disk" / KEY).read_bytes() == b"x"


async def test_a_named_pipe_in_an_objects_place_does_not_hang_a_reader(store: ObjectStore, root: Path) -> None:
    await store.put("a/b", b"x")
    os.mkfifo(root / "a/pipe")
    with pytest.raises(DamagedObjectError, match="not a regular file"):
        await store.head("a/pipe")
    assert await names(store.list()) == ["a/b"]


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        at = os.open(path.parent, os.O_RDONLY)  # a socket's own path may have 107 bytes only
        try:
            made.bind(f"/proc/self/fd/{at}/{path.name}")
        finally:
            os.close(at)


ODD: dict[str, Callable[[Path], object]] = {
    "a directory": lambda path: path.mkdir(),
    "a link": lambda path: path.symlink_to("b"),
    "a dangling link": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pipe": lambda path: os.mkfifo(path),
    "a socket": make_socket,
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
async def test_what_lies_in_one_objects_place_is_that_objects_damage(
    store: ObjectStore, root: Path, make: Callable[[Path], object]
) -> None:
    await store.put("a/b", b"x")
    make(root / "a/odd")
    for attempt in (store.head("a/odd"), read(store, "a/odd", 0, 1)):
        with pytest.raises(DamagedObjectError, match=re.escape(f"{root / 'a/odd'}: ")) as caught:
            await attempt
        assert caught.value.code == BitstreamFault.TRUNCATED
    with pytest.raises(StoreRefusedError, match=re.escape(f"{root / 'a/odd'}: a file was expected")):
        await store.put("a/odd", b"y")
    assert await read(store, "a/b", 0, 1) == b"x"


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
async def test_all_but_a_directory_can_be_replaced_by_an_object(
    store: ObjectStore, root: Path, make: Callable[[Path], object]
) -> None:
    await store.put("a/b", b"x")
    make(root / "a/odd")
    if (root / "a/odd").is_dir():
        with pytest.raises(StoreRefusedError, match=re.escape(f"{root / 'a/odd'}: a file was expected; a directory")):
            await store.put("a/odd", b"y", replace=True)
        assert os.listdir(root / ".tmp") == []
    else:
        assert await store.put("a/odd", b"y", replace=True) is True
        assert await read(store, "a/odd", 0, 1) == b"y"
    assert await read(store, "a/b", 0, 1) == b"x"


async def test_a_file_in_the_place_of_an_objects_directory_is_that_objects_damage(
    store: ObjectStore, root: Path
) -> None:
    await store.put("a/b", b"x")
    for attempt in (store.head("a/b/c/d"), read(store, "a/b/c/d", 0, 1)):
        with pytest.raises(DamagedObjectError, match=re.escape(f"{root / 'a/b'}: ")):
            await attempt
    for replace in (False, True):
        with pytest.raises(StoreRefusedError, match=re.escape(f"{root / 'a/b'}: a directory was expected")):
            await store.put("a/b/c/d", b"x", replace=replace)


async def test_an_object_that_the_disk_cannot_read_is_damaged(
    store: ObjectStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    await store.put("a/b", b"x")
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(DamagedObjectError, match=re.escape(f"{root / 'a/b'}: the disk cannot read it")):
        await read(store, "a/b", 0, 1)


async def test_errors_name_paths_that_exist(store: ObjectStore, root: Path) -> None:
    await store.put("a/b/c", b"x")
    with pytest.raises(StoreRefusedError, match=re.escape(f"{root / 'a/b'}: a file was expected; a directory")):
        await store.delete("a/b")
    with pytest.raises(StoreRefusedError, match=re.escape(f"{root / 'a/b/c'}: a directory was expected")):
        await names(store.list("a/b/c/d"))
    (root / "a/b/link").symlink_to("c")
    with pytest.raises(StoreRefusedError, match=re.escape(f"{root / 'a/b/link'}: a directory was expected")):
        await store.delete("a/b/link/d")
    (root / ".tmp").rmdir()
    (root / ".tmp").write_bytes(b"x")
    with pytest.raises(StoreRefusedError, match=re.escape(f"{root / '.tmp'}: a directory was expected")):
        await store.put("a/new", b"x")


async def test_an_object_that_may_not_be_read_is_refused_by_its_name(store: ObjectStore, root: Path) -> None:
    await store.put("a/b", b"x")
    (root / "a/b").chmod(0)
    if os.access(root / "a/b", os.R_OK):
        pytest.skip("this user may do everything")
    for attempt in (store.head("a/b"), read(store, "a/b", 0, 1)):
        with pytest.raises(StoreRefusedError, match=re.escape(f"{root / 'a/b'}: permission denied")):
            await attempt


async def test_foreign_files_are_not_listed(store: ObjectStore, root: Path) -> None:
    await store.put("a/b", b"x")
    for name in ("README", ".hidden", "a/.part", "a/With Space"):
        (root / name).write_bytes(b"x")
    assert await names(store.list()) == ["a/b"]


@pytest.mark.parametrize("value", [b"{", b"[]", b'{"a": 1}', b"\xff", b"[" * 3000, b""])
async def test_metadata_that_make_no_sense_are_none(store: ObjectStore, root: Path, value: bytes) -> None:
    await store.put(KEY, b"x", metadata={"a": "b"})
    try:
        os.setxattr(root / KEY, "user.kvstore-s3", value)
    except OSError:
        pytest.skip("the file system keeps no extended attributes of this size")
    assert await store.head(KEY) == ObjectInfo(KEY, 1, {})


async def test_a_file_in_the_roots_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    store = open_store((tmp_path / "file").as_uri(), Settings())
    for attempt in (store.probe(), store.put(KEY, b"x"), store.head(KEY)):
        with pytest.raises(StoreRefusedError, match=r"file: a directory was expected.*\[ENOTDIR\]"):
            await attempt
    await store.close()


async def test_a_directory_in_an_objects_place_is_refused(store: ObjectStore) -> None:
    await store.put("a/b/c", b"x")
    with pytest.raises(StoreRefusedError):
        await store.put("a/b", b"x")
    with pytest.raises(StoreRefusedError):
        await store.put("a/b/c/d", b"x")


WRITER = """
import asyncio, sys
from kvstore_s3.config import Settings
from kvstore_s3.objectstore import local_files
from kvstore_s3.objectstore.open import open_store

write_all = local_files._write_all
def stall(file, data):
    write_all(file, data[: len(data) // 2])
    print("half written", flush=True)
    sys.stdin.read()
local_files._write_all = stall
asyncio.run(open_store(sys.argv[1], Settings()).put(sys.argv[2], bytes(1000)))
"""


@pytest.fixture
def stalled_writer(root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has written half an object."""
    command = [sys.executable, "-c", WRITER, root.as_uri(), KEY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half written\n"
        yield process
        process.kill()


async def test_a_killed_writer_leaves_nothing_visible_and_is_swept_up_after(
    store: ObjectStore, root: Path, stalled_writer: subprocess.Popen[bytes]
) -> None:
    stalled_writer.send_signal(signal.SIGKILL)
    stalled_writer.wait()
    assert len(os.listdir(root / ".tmp")) == 1
    assert await store.head(KEY) is None
    assert await names(store.list()) == []
    await store.probe()
    assert os.listdir(root / ".tmp") == []
    assert await store.put(KEY, b"x") is True


async def test_a_living_writer_is_not_swept(
    store: ObjectStore, root: Path, stalled_writer: subprocess.Popen[bytes]
) -> None:
    await store.probe()
    assert len(os.listdir(root / ".tmp")) == 1
    stalled_writer.communicate()
    assert stalled_writer.returncode == 0
    assert await store.head(KEY) == ObjectInfo(KEY, 500, {})
    assert os.listdir(root / ".tmp") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def make_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


async def test_a_full_disk_is_unavailable_and_keeps_no_half_objects(small_disk: Path) -> None:
    store = open_store(small_disk.as_uri(), Settings())
    await store.put("a", bytes(1000))
    with pytest.raises(StoreUnavailableError, match=r"no space is left; free some or use another directory \[ENOSPC\]"):
        await store.put("b", bytes(2_000_000))
    assert await names(store.list()) == ["a"]
    assert os.listdir(small_disk / ".tmp") == []
    assert await store.put("b", bytes(10_000)) is True
    await store.close()


async def test_a_read_only_disk_can_be_read_and_refuses_writes(small_disk: Path) -> None:
    store = open_store(small_disk.as_uri(), Settings())
    await store.put("a", b"x")
    make_read_only(small_disk)
    reader = open_store(small_disk.as_uri(), Settings())
    await reader.probe()
    assert await read(reader, "a", 0, 1) == b"x"
    with pytest.raises(StoreRefusedError, match="read-only"):
        await reader.put("b", b"x")
    await reader.close()
    await store.close()


async def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    if os.access(tmp_path / "closed", os.R_OK):
        pytest.skip("this user may do everything")
    store = open_store((tmp_path / "closed").as_uri(), Settings())
    for attempt in (store.probe(), store.put(KEY, b"x"), store.head(KEY)):
        with pytest.raises(StoreRefusedError, match="permission denied"):
            await attempt
    await store.close()


async def test_the_url_is_that_of_the_directory(store: ObjectStore, root: Path) -> None:
    assert store.url == root.as_uri()
    assert re.search("by%20the%20store$", store.url)
