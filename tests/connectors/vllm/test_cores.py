"""Threads of a worker that its engine has pinned: where may they run?"""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

import pytest
import torch

from kvstore_s3 import KVLayout, Namespace, Settings, connect
from kvstore_s3.connectors.vllm.cores import spread_over_cores

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be pinned here")

LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=16, dtype="float32")


def pinned_worker(directory: str, answers: multiprocessing.Queue[dict[str, set[int]]]) -> None:
    """As vLLM's CPU worker: its main thread is pinned to one core before the connector is made."""
    first = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {first})
    namespace = Namespace(model="m", revision="1", layout=LAYOUT, chunk_tokens=16)
    settings = Settings(nvme_tier_dir=Path(directory) / "nvme", host_tier_bytes=1 << 20)
    kv = torch.randn(2, 2, 64, 2, 16)
    with connect(f"file://{directory}/store", namespace, settings, initializer=spread_over_cores) as store:
        store.save(range(64), kv)
        for _ in range(2):
            assert torch.equal(store.load(store.lookup(range(64))), kv)
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        answers.put(
            {
                f"{names[int(task)]} {task}": os.sched_getaffinity(int(task))
                for task in os.listdir("/proc/self/task")
                if int(task) in names
            }
        )


def test_every_thread_of_the_store_may_use_every_core_though_the_worker_is_pinned(tmp_path: Path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    worker = spawn.Process(target=pinned_worker, args=(str(tmp_path), answers))
    worker.start()
    found = answers.get(timeout=120)
    worker.join(60)
    assert worker.exitcode == 0
    ours = {name: cores for name, cores in found.items() if not name.startswith(("MainThread", "QueueFeeder"))}
    assert any("kvstore-s3" in name for name in ours), found
    assert any("nvme" in name for name in ours), found
    assert all(cores == os.sched_getaffinity(0) for cores in ours.values()), found
    assert [len(cores) for name, cores in found.items() if name.startswith("MainThread")] == [1], "as the engine set it"


def test_a_process_that_no_engine_started_is_left_as_it_is():
    before = os.sched_getaffinity(0)
    spread_over_cores()
    assert os.sched_getaffinity(0) == before
