"""The fault matrix, disks: whatever happens to the tier on this machine's disk, the object store goes on."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from faults import loading_process
from faults.scene import CHUNKS, PATIENT, REAL, TOKENS, Scene, serve

from kvstore_s3 import KVStore

pytestmark = [
    pytest.mark.usefixtures("quiet", "no_leaks"),
    pytest.mark.parametrize("server", REAL[:1], indirect=True),  # disks do not care which server is behind them
]


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    return tmp_path / "tier"


def open_tiered(scene: Scene, tier: Path, **overrides: object) -> KVStore:
    return scene.open(nvme_tier_dir=tier, nvme_tier_bytes=64 * 1024 * 1024, **{**PATIENT, **overrides})


def files_in(tier: Path) -> list[Path]:
    """Files of pieces, the largest things in the tier."""
    return sorted(path for path in tier.rglob("*") if path.is_file() and path.stat().st_size > 8192)


def temporaries_in(tier: Path) -> list[Path]:
    return [path for path in tier.rglob(".tmp/**/*") if path.is_file()]


def mount(place: Path, options: str, *more: str) -> bool:
    return subprocess.run(["mount", *more, "-o", options, place], capture_output=True).returncode == 0


async def warm(scene: Scene, tier: Path) -> None:
    """Load once, so that the tier has all of it."""
    async with open_tiered(scene, tier) as store:
        await scene.assert_served_in_full(store)
    assert len(files_in(tier)) == CHUNKS


async def test_what_was_loaded_is_read_from_the_disk_and_not_again_from_the_store(filled: Scene, tier: Path) -> None:
    await warm(filled, tier)
    filled.proxy.clear()
    async with open_tiered(filled, tier) as store:
        await filled.assert_served_in_full(store)
        assert store.counters.snapshot()["nvme_hit_bytes"] > 0
    assert filled.proxy.count("GetObject") == 0


async def test_an_outage_is_bridged_by_the_disk(filled: Scene, tier: Path) -> None:
    async with open_tiered(filled, tier) as store:
        await filled.assert_served_in_full(store)
        await store._loader.settle()
        filled.proxy.refuse()
        served = await serve(store, filled.kv)
        assert (served.tokens, served.error) == (len(TOKENS), None)
        filled.proxy.recover()


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as target:
        target.seek(at)
        byte = target.read(1)[0]
        target.seek(at)
        target.write(bytes([byte ^ 4]))


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def turn_into_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def swap_with_neighbour(file: Path) -> None:
    other = next(path for path in files_in(file.parent.parent) if path != file)
    aside = file.with_name("aside")
    file.rename(aside), other.rename(file), aside.rename(other)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "first byte": lambda file: flip(file, 0),
    "the key in the tier's header": lambda file: flip(file, 50),
    "the object's header": lambda file: flip(file, 4096 + 20),
    "the object's index": lambda file: flip(file, 4096 + 200),
    "a section": lambda file: flip(file, file.stat().st_size // 2),
    "the last byte of a section": lambda file: flip(file, 4096 + 60_000),
    "half of it": halve,
    "all of it": lambda file: os.truncate(file, 0),
    "removed": Path.unlink,
    "a directory": turn_into_directory,
    "another object's": swap_with_neighbour,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("when", ["before it is opened", "while it is open"])
async def test_a_damaged_file_is_read_from_the_store_instead(
    filled: Scene, tier: Path, damage: Callable[[Path], object], when: str
) -> None:
    await warm(filled, tier)
    if when == "before it is opened":
        damage(files_in(tier)[1])
    async with open_tiered(filled, tier) as store:
        if when == "while it is open":
            await filled.assert_served_in_full(store)
            damage(files_in(tier)[1])
        await filled.assert_served_in_full(store)
        await store._loader.settle()
        met = met_in(store)
        await filled.assert_served_in_full(store)
        assert met_in(store) == met, "what was damaged is met again"


def met_in(store: KVStore) -> int:
    """How much damage the tiers have shown."""
    counters = store.counters.snapshot()
    return counters.get("tier_damage", 0) + counters.get("nvme_errors", 0)


async def test_a_directory_that_is_removed_is_no_failure(filled: Scene, tier: Path) -> None:
    async with open_tiered(filled, tier) as store:
        await filled.assert_served_in_full(store)
        await store._loader.settle()
        shutil.rmtree(tier)
        for _ in range(3):
            await filled.assert_served_in_full(store)


async def test_a_file_where_the_directory_should_be_is_no_failure(filled: Scene, tier: Path) -> None:
    await asyncio.to_thread(tier.write_text, "in the way")
    async with open_tiered(filled, tier) as store:
        await filled.assert_served_in_full(store)
        await filled.assert_served_in_full(store)
    assert await asyncio.to_thread(tier.read_text) == "in the way"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 384 KiB, less than the prompt takes."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or shutil.which("mount") is None or not mount(place, "size=384k", "-t", "tmpfs", "tmpfs"):
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


async def test_a_full_disk_is_no_failure(filled: Scene, small_disk: Path) -> None:
    async with open_tiered(filled, small_disk / "tier") as store:
        for _ in range(3):
            await filled.assert_served_in_full(store)
            await store._loader.settle()
        assert store.counters.snapshot()["nvme_errors"] > 0
    assert temporaries_in(small_disk) == []


async def test_a_disk_that_turns_read_only_is_no_failure(filled: Scene, small_disk: Path) -> None:
    assert mount(small_disk, "remount,size=64m")
    tier = small_disk / "tier"
    await warm(filled, tier)
    assert mount(small_disk, "remount,ro")
    filled.proxy.clear()
    async with open_tiered(filled, tier) as store:
        await filled.assert_served_in_full(store)
        await filled.assert_served_in_full(store)


async def test_too_large_a_file_is_no_failure(filled: Scene, tier: Path) -> None:
    """EFBIG, a failure of write as EIO is one."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with open_tiered(filled, tier) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
        try:
            for _ in range(2):
                await filled.assert_served_in_full(store)
                await store._loader.settle()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
    assert files_in(tier) == []


async def kill_while_loading(scene: Scene, tier: Path, after_s: float) -> None:
    environment = {
        **os.environ,
        **scene.server.environment(),
        "KVSTORE_S3_NVME_TIER_DIR": str(tier),
        "KVSTORE_S3_CACHE_DIR": str(scene.cache_dir),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, loading_process.__file__, scene.url, env=environment, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"loading\n"
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), after_s)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def test_readers_killed_while_they_write_to_the_disk_leave_nothing_half_made(filled: Scene, tier: Path) -> None:
    for after_s in (0.01, 0.03, 0.1):
        await kill_while_loading(filled, tier, after_s)
        async with open_tiered(filled, tier) as store:
            await filled.assert_served_in_full(store)
    async with open_tiered(filled, tier) as store:
        await filled.assert_served_in_full(store)
        assert store.counters.snapshot()["nvme_hit_bytes"] > 0
    assert len(files_in(tier)) == CHUNKS
    assert temporaries_in(tier) == []


async def test_a_host_tier_serves_without_the_store_and_gives_its_memory_back(filled: Scene) -> None:
    async with filled.open(host_tier_bytes=4 * 1024 * 1024, **PATIENT) as store:
        await filled.assert_served_in_full(store)
        await store._loader.settle()
        filled.proxy.refuse()
        await filled.assert_served_in_full(store)
        assert store.counters.snapshot()["host_hit_bytes"] > 0
        filled.proxy.recover()


@pytest.mark.parametrize("at", [0, 20, 200, 30_000, -1])
async def test_a_bit_that_flips_in_host_memory_is_read_from_the_store_instead(filled: Scene, at: int) -> None:
    async with filled.open(host_tier_bytes=4 * 1024 * 1024, **PATIENT) as store:
        await filled.assert_served_in_full(store)
        await store._loader.settle()
        key = (await store.lookup(TOKENS)).chunks[1].object_key
        length = (await store.lookup(TOKENS)).chunks[1].table.object_length
        host = store._loader.tiers._host
        assert host is not None
        at %= length
        borrowed = host.borrow(key, at, at + 1)
        assert borrowed is not None
        with borrowed as view:
            flip_in_memory(view)
        await filled.assert_served_in_full(store)
        await filled.assert_served_in_full(store)


def flip_in_memory(view: memoryview) -> None:
    """Even where it is read-only, as bad memory would."""
    address = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    ctypes.c_ubyte.from_address(address).value ^= 8
