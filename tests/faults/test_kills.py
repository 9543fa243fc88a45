"""The fault matrix, kill -9 at each step of an upload: nothing half-made is ever seen, the janitor finds the rest."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from fault_proxy import Rule
from faults import putting_process
from faults.actions import Delay, Interrupt, LoseAnswer
from faults.putting_process import KEY, content
from faults.scene import ON_REAL_SERVERS, PATIENT, Scene, digest

from kvstore_s3.cli import exits
from kvstore_s3.cli.gc import GcOptions, collect_garbage
from kvstore_s3.objectstore.open import open_store

pytestmark = ON_REAL_SERVERS

MiB = 1024 * 1024
PARTS, WHOLE = 11 * MiB, MiB
"""Bytes of an object that is uploaded in parts, and of one that is not."""

STEPS = {
    "before Create": ("CreateMultipartUpload", 0, 0),
    "after Create": ("CreateMultipartUpload", 0, None),
    "in a part": ("UploadPart", 0, 1_000_000),
    "between parts": ("UploadPart", 1, None),
    "before Complete": ("CompleteMultipartUpload", 0, 0),
    "after Complete": ("CompleteMultipartUpload", 0, None),
    "before PUT": ("PutObject", 0, 0),
    "in PUT": ("PutObject", 0, 100_000),
    "after PUT": ("PutObject", 0, None),
}


def environment(scene: Scene) -> Mapping[str, str]:
    return {
        **os.environ,
        **scene.server.environment(),
        "KVSTORE_S3_ENDPOINT_URL": scene.proxy.endpoint,
        "KVSTORE_S3_MULTIPART_BYTES": str(5 * MiB),
        "KVSTORE_S3_CACHE_DIR": str(scene.cache_dir),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


@contextmanager
def putting(scene: Scene, size: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, putting_process.__file__, scene.url, str(size)],
        env=environment(scene),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def ended(process: subprocess.Popen[str]) -> str:
    output, _ = await asyncio.to_thread(process.communicate, timeout=60)
    return output


async def sweep(scene: Scene) -> None:
    """What `kvstore-s3 gc --uploads --older-than 0s` does."""
    settings = scene.settings(store=scene.url, **PATIENT)
    report = await asyncio.to_thread(collect_garbage, GcOptions(uploads=True, older_than="0s"), settings)
    assert report.exit_code == exits.DONE, report.lines


async def uploads(scene: Scene) -> list[str]:
    return await asyncio.to_thread(scene.uploads, f"{scene.prefix}/{KEY}")


async def assert_whole(scene: Scene, size: int) -> None:
    found = await asyncio.to_thread(scene.read, f"{scene.prefix}/{KEY}")
    assert digest(found) == digest(content(size))


def journals(folder: Path) -> list[Path]:
    return list((folder / "uploads").glob("*"))


@pytest.mark.parametrize("step", STEPS)
async def test_a_writer_killed_at_any_step_leaves_a_whole_object_or_none_and_no_upload(scene: Scene, step: str) -> None:
    operation, skip, sent = STEPS[step]
    size = WHOLE if operation == "PutObject" else PARTS
    with putting(scene, size) as process:
        kill = Interrupt(lambda: os.kill(process.pid, signal.SIGKILL), sent=sent)
        with scene.proxy.fault(operation, kill, skip=skip, times=1) as rule:
            output = await ended(process)
            assert rule.met == 1, output
    assert process.returncode == -signal.SIGKILL

    store = open_store(scene.url, scene.settings(**PATIENT))
    try:
        if operation in ("PutObject", "CompleteMultipartUpload") and sent is None:
            await assert_whole(scene, size)
        else:
            assert await store.head(KEY) is None
        await sweep(scene)
        assert await uploads(scene) == []
        await store.put(KEY, content(size))
    finally:
        await store.close()
    await assert_whole(scene, size)
    assert await uploads(scene) == []
    assert journals(scene.cache_dir) == []


async def test_an_upload_whose_create_was_never_acknowledged_is_found_by_the_janitor(scene: Scene) -> None:
    with scene.proxy.fault("CreateMultipartUpload", LoseAnswer(), times=1) as rule, putting(scene, PARTS) as process:
        output = await ended(process)
        assert (process.returncode, rule.met) == (0, 1), output
    await assert_whole(scene, PARTS)
    await sweep(scene)
    assert await uploads(scene) == []
    assert journals(scene.cache_dir) == []


async def test_what_a_killed_writer_left_is_removed_when_the_store_is_used_again(scene: Scene) -> None:
    with putting(scene, PARTS) as process:
        kill = Interrupt(lambda: os.kill(process.pid, signal.SIGKILL), sent=None)
        with scene.proxy.fault("UploadPart", kill, times=1):
            await ended(process)
    assert await uploads(scene) != []
    for _ in range(10):  # a store that is closed soon may have to leave some of the rest to the next one
        with putting(scene, PARTS) as process:
            assert await ended(process) == "created\n"
        if not journals(scene.cache_dir):
            break
        await asyncio.to_thread(scene.delete, f"{scene.prefix}/{KEY}")
    assert await uploads(scene) == []
    assert journals(scene.cache_dir) == []


async def test_writers_of_one_object_in_several_processes_agree(scene: Scene) -> None:
    scene.proxy.add(Rule("CompleteMultipartUpload", Delay(0.3)), Rule("CreateMultipartUpload", Delay(0.3)))
    with putting(scene, PARTS) as one, putting(scene, PARTS) as other, putting(scene, PARTS) as third:
        outputs = [await ended(process) for process in (one, other, third)]
    assert sorted(outputs) == ["created\n", "there already\n", "there already\n"]
    await assert_whole(scene, PARTS)
    assert await uploads(scene) == []
    assert journals(scene.cache_dir) == []
