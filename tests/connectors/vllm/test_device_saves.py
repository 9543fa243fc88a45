"""Saves out of a device's blocks that the store was in doubt about: what was given back is not read later."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

import torch  # noqa: E402
from device.emulated import build  # noqa: E402
from partitions import CHUNK, LAYOUT, TOKENS, draw_kv  # noqa: E402

from kvstore_s3 import KVStore, Namespace, Settings  # noqa: E402
from kvstore_s3.codec.device.encoder import SMALLEST_BUDGET, DeviceEncoder  # noqa: E402
from kvstore_s3.codec.device.library import Library  # noqa: E402
from kvstore_s3.codec.device.sources import Source  # noqa: E402
from kvstore_s3.connectors.vllm.health import StoreHealth, late  # noqa: E402
from kvstore_s3.connectors.vllm.messages import SaveOrder, SaveReport  # noqa: E402
from kvstore_s3.connectors.vllm.plans import TokenRange  # noqa: E402
from kvstore_s3.connectors.vllm.saves import _AT_ONCE, ReadLater, Saver  # noqa: E402
from kvstore_s3.connectors.vllm.stats import Tally  # noqa: E402
from kvstore_s3.device_save import DeviceKV  # noqa: E402
from kvstore_s3.hashing import as_token_array, chunk_keys, root_key  # noqa: E402


def test_a_save_that_never_begins_is_not_waited_for():
    """It was cancelled, as the store was closed, before it could say that it reads no more."""
    order, later, saving = SaveOrder(0, "r", TokenRange(0, 64), (), (), "lossless"), ReadLater(), Future[None]()
    later.begin(order, Source(None))
    saving.add_done_callback(partial(later.end, order))
    threading.Timer(0.01, saving.cancel).start()
    later.wait()
    later.end(order)
    later.hold(["r"])
    assert later.take_unread() == {"r"}


async def test_what_was_not_read_while_the_store_was_in_doubt_is_not_read_later(
    tmp_path: Path, pytestconfig: pytest.Config
):
    """Its blocks were given back then, and hold another request's KV by the time the store is there again."""
    library = Library(build(Path(pytestconfig.cache.mkdir("kernels"))), emulated=True)
    namespace = Namespace(model="parted", revision="1", layout=LAYOUT, chunk_tokens=CHUNK)
    async with KVStore.open(f"file://{tmp_path}", namespace, Settings()) as store:
        health = StoreHealth(store.objects, store.settings)
        reports, read = list[SaveReport](), asyncio.Event()
        saver = Saver(
            store,
            health,
            Tally("rank 0"),
            on_read=lambda _: read.set(),
            on_end=lambda report, _: reports.append(report),
        )
        for _ in range(_AT_ONCE):
            await saver._turns.acquire()  # saves before it wait for the store
        kv = draw_kv(tokens=64)
        keys = tuple(chunk_keys(root_key(namespace.digest, None), as_token_array(TOKENS), CHUNK))[: 64 // CHUNK]
        order = SaveOrder(0, "r", TokenRange(0, 64), (), keys, "lossless")
        health.report(late("load", 1.0))
        with DeviceEncoder(library, torch.device("cpu"), SMALLEST_BUDGET) as encoder:
            saving = asyncio.create_task(saver.save(order, DeviceKV.of(kv, encoder)))
            await read.wait()
            kv.fill_(42.0)
            for _ in range(1000):
                if health.available:
                    break
                await asyncio.sleep(0.01)
            for _ in range(_AT_ONCE):
                saver._turns.release()
            await saving
        assert health.available
        assert [report.end for report in reports] == ["shed"]
        assert (await store.lookup_keys(keys)).tokens == 0
