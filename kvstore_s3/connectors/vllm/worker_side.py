"""The half in a worker's process: moves KV between the engine's blocks and the store, beside the steps."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import torch
from vllm.model_executor.models.utils import extract_layer_index

from kvstore_s3.codec.device.decoder import DeviceDecoder
from kvstore_s3.codec.device.encoder import DeviceEncoder
from kvstore_s3.connectors.vllm.blocks import Blocks, DeviceBlocks, HostBlocks, PagesReady
from kvstore_s3.connectors.vllm.device_cache import DeviceCache, engine_device
from kvstore_s3.connectors.vllm.following import Follower
from kvstore_s3.connectors.vllm.gates import LayerGate
from kvstore_s3.connectors.vllm.health import StoreHealth, log, result_or_none
from kvstore_s3.connectors.vllm.loads import Loader, LoadUnderWay
from kvstore_s3.connectors.vllm.messages import (
    LinkReport,
    LoadOrder,
    LoadReport,
    SaveOrder,
    SaveReport,
    StepOrders,
    StepReport,
)
from kvstore_s3.connectors.vllm.options import Options
from kvstore_s3.connectors.vllm.paged import PagedCache
from kvstore_s3.connectors.vllm.plans import failed_blocks
from kvstore_s3.connectors.vllm.saves import ReadLater, SaveBudget, Saver
from kvstore_s3.connectors.vllm.stats import Tally
from kvstore_s3.device_save import DeviceKV
from kvstore_s3.errors import DeviceError, KVStoreError
from kvstore_s3.runtime import SyncKVStore
from kvstore_s3.store import KVStore

_WRITERS = 2
"""Threads that write pages: beside decoding, they would only take its cores."""


class WorkerSide:
    """All methods run on the worker's thread; results come over from the event loop under a lock.

    `writes` is False for a rank whose heads another one has too, and saves. `warm_tokens`: how many tokens' blocks
    are to have memory before the first load writes them.
    """

    def __init__(
        self,
        store: SyncKVStore,
        health: StoreHealth,
        options: Options,
        tally: Tally,
        *,
        block_tokens: int,
        model_dtype: torch.dtype,
        writes: bool = True,
        warm_tokens: int = 0,
    ) -> None:
        self._warm_tokens = warm_tokens
        self._store = store
        self._health = health
        self._options = options
        self._tally = tally
        self._block_tokens = block_tokens
        self._model_dtype = model_dtype
        self._writes = writes
        layout, shard = store.namespace.layout, store.kv.shard
        self._bytes_per_token = 2 * shard.layers * shard.heads * layout.head_dim * layout.itemsize
        self._budget = SaveBudget(options.save_memory_bytes)
        self._saver = Saver(store.kv, health, tally, on_read=self._note_read, on_end=self._note_save)
        self._writer = ThreadPoolExecutor(_WRITERS, "kvstore-s3-pages")
        self._waiter = ThreadPoolExecutor(1, "kvstore-s3-steps")
        self._cache: PagedCache | DeviceCache
        self._told_full = False
        self._encoder: DeviceEncoder | None = None
        self._read_later = ReadLater()
        self._under_way: set[concurrent.futures.Future[None]] = set()
        self._loads: dict[str, LoadUnderWay] = {}
        self._broken: set[str] = set()
        self._epoch = 0
        self._step: StepOrders | None = None
        self._decoder: DeviceDecoder | None = None
        self._pages_ready = PagesReady()
        self._gates: list[LayerGate] = []
        self._lock = threading.Lock()
        self._load_ended = threading.Event()
        self._ended_loads: list[LoadUnderWay] = []
        self._ended_saves: list[tuple[SaveReport, int]] = []
        self._failed_blocks: set[int] = set()
        self._load_reports: list[LoadReport] = []
        self._save_reports: list[SaveReport] = []

    def adopt(self, caches: Mapping[str, torch.Tensor]) -> None:
        """Take over vLLM's KV caches. Raises `UnsupportedModelError` where their pages are not understood."""
        kv = self._store.kv
        self._loader = Loader(
            kv,
            self._adopt(caches),
            self._health,
            Follower(kv),
            deadline_s=self._options.load_deadline_s,
            stall_s=self._options.follow_stall_s,
            on_end=self._note_load,
        )

    def begin_step(self, orders: StepOrders) -> None:
        """Start the loads of a step; those between steps run while it computes. Pages are not written yet."""
        if orders is self._step:
            return
        self._step = orders
        self._read_later.hold(orders.held)
        self._take_back(orders.preempted)
        self._pages_ready.set()  # for whoever began in a step that never computed
        self._pages_ready = PagesReady(None if self._decoder is None else self._decoder.mark_current)
        if orders.epoch != self._epoch:
            self._epoch = orders.epoch
            self._drop_loads()
        for order in orders.loads:
            self._start_load(order)

    def let_write(self, orders: StepOrders) -> None:
        """The engine has prepared its pages for this step: what is loaded may be written."""
        self.begin_step(orders)
        self._pages_ready.set()

    def wait_for_layer(self, layer_name: str) -> None:
        """Wait until the loads that this step needs have written the layer, or ended.

        On a device: until they are in its queue, and let the engine's own wait for them there.
        """
        self._pages_ready.set()
        if self._gates:
            layer = extract_layer_index(layer_name)
            for gate in self._gates:
                for mark in gate.wait(layer):
                    assert self._decoder is not None  # who else makes marks
                    self._decoder.hold_current(mark)

    def start_saves(self, orders: StepOrders) -> None:
        """Copy what is to be saved out of the blocks now, while they surely hold it; the rest happens later.

        On a device, reading happens later too: in its own queue, behind a mark in the engine's.
        """
        for gate in self._gates:
            gate.wait_for_end()
        self._gates.clear()
        for order in orders.saves:
            if not self._writes:
                self._save_reports.append(SaveReport(order.save_id, "stored"))
                continue
            size = self._bytes_per_token * (order.tokens.end - order.tokens.begin)
            if not self._may_save(order, size):
                self._give_up(order, "shed")
            elif (kv := self._read(order)) is None:
                self._budget.give_back(size)
                self._give_up(order, "failed")
            else:
                self._track(saving := self._store.runtime.submit(self._saver.save(order, kv)))
                saving.add_done_callback(partial(self._read_later.end, order))  # where it is cancelled at once
        if orders.read_now:
            self._read_later.wait()

    def take_ended_loads(self, finished: set[str], *, idle_s: float) -> set[str]:
        """Requests whose load between steps has ended, well or not. `finished` requests are gone: theirs are cut."""
        for request_id in finished & self._loads.keys():
            self._store.runtime.submit(self._loader.revoke(self._loads[request_id]))
        self._broken -= finished
        if idle_s:
            self._load_ended.wait(idle_s)
        with self._lock:
            self._load_ended.clear()
            loads, self._ended_loads = self._ended_loads, []
            saves, self._ended_saves = self._ended_saves, []
        for report, size in saves:
            self._budget.give_back(size)
            self._save_reports.append(report)
        for load in loads:
            self._settle(load)
        return {load.order.request_id for load in loads if not load.order.by_layer}

    def take_unread(self) -> set[str]:
        """Requests that have ended, and whose blocks no save reads any more."""
        return self._read_later.take_unread()

    def take_failed_blocks(self) -> set[int]:
        """Blocks of ended loads that were not filled; the engine computes them."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    @property
    def has_report(self) -> bool:
        """Whether loads or saves ended in this step."""
        return bool(self._load_reports or self._save_reports)

    def take_report(self) -> StepReport | None:
        """What the scheduler half has to know about ended loads and saves."""
        if not self.has_report:
            return None
        stats = self._store.kv.stats()
        link = LinkReport(stats.get("link_bytes_per_s"), stats.get("link_latency_s", 0.0))
        report = StepReport(tuple(self._load_reports), tuple(self._save_reports), (link,))
        self._load_reports, self._save_reports = [], []
        return report

    def measure(self) -> None:
        """Bring this half's gauges up to date."""
        self._tally.set("kvstore_save_queue_bytes", self._budget.taken)

    def flush(self) -> None:
        """Wait for what is under way, at most `flush_s`; what is not done then is cancelled when the store closes."""
        self._pages_ready.set()
        concurrent.futures.wait(set(self._under_way), timeout=self._options.flush_s)

    def close(self) -> None:
        """Release the threads that write blocks. To be called when the store is closed."""
        self._waiter.shutdown()
        self._writer.shutdown()

    def _adopt(self, caches: Mapping[str, torch.Tensor]) -> Blocks:
        kv, layout = self._store.kv, self._store.namespace.layout
        self._decoder = kv.decoder_for(engine_device(caches))
        if self._decoder is not None:
            self._encoder = kv.encoder_for(self._decoder)
            self._cache = on_device = DeviceCache.adopt(caches, layout, self._block_tokens, shard=kv.shard)
            if self._writes and kv.quality.object_profile == "scalable":
                self._store.runtime.submit(_learn_calibration(kv)).add_done_callback(result_or_none)
            return DeviceBlocks(on_device, self._decoder, self._waiter)
        self._cache = on_host = PagedCache.adopt(
            caches, layout, self._block_tokens, shard=kv.shard, model_dtype=self._model_dtype
        )
        if self._warm_tokens:
            self._writer.submit(on_host.populate, self._warm_tokens)
        return HostBlocks(on_host, self._writer, self._waiter)

    def _give_up(self, order: SaveOrder, end: str) -> None:
        self._broken.add(order.request_id)
        self._save_reports.append(SaveReport(order.save_id, end))

    def _read(self, order: SaveOrder) -> torch.Tensor | DeviceKV | None:
        """The KV to be saved: a copy, or what is to be read; None where the device fails."""
        if isinstance(self._cache, PagedCache):
            return self._cache.read(order.tokens, order.block_ids)
        assert self._encoder is not None
        try:
            kv = self._cache.read_later(order.tokens, order.block_ids, self._encoder)
        except DeviceError as error:
            log.warning("KV is not saved: %s", error)
            return None
        self._read_later.begin(order, kv.source)
        return kv

    def _take_back(self, preempted: Sequence[str]) -> None:
        """The blocks of these requests are others' from this step on: what is read of them comes before."""
        if not preempted or self._encoder is None:
            return
        try:
            self._encoder.hold_back(self._read_later.sources_of(preempted))
        except DeviceError as error:  # the engine's own work will fail as well
            log.warning("blocks of preempted requests could not be held back: %s", error)

    def _start_load(self, order: LoadOrder) -> None:
        gate = LayerGate()
        load = LoadUnderWay(order, self._pages_ready, gate, order.tokens.begin)
        self._loads[order.request_id] = load
        if order.by_layer:
            self._gates.append(gate)
        self._track(self._store.runtime.submit(self._loader.load(load)))

    def _drop_loads(self) -> None:
        """What is being loaded is of weights that the engine has no more; nor is what has arrived just now."""
        for load in self._loads.values():
            self._store.runtime.submit(self._loader.revoke(load))
            load.revoked = True

    def _may_save(self, order: SaveOrder, size: int) -> bool:
        """A chunk is of no use without those before it, so a request that lost one saves no more."""
        if not self._health.available or order.request_id in self._broken:
            return False
        taken = self._budget.take(size)
        if not taken and not self._told_full:
            self._told_full = True
            log.warning(
                "KV is not saved, as save_memory_bytes wait to be stored already: the store, or the link to it, is "
                "slower than this engine computes (said once; kvstore_saves_shed counts them)"
            )
        return taken

    def _track(self, future: concurrent.futures.Future[None]) -> None:
        self._under_way.add(future)
        future.add_done_callback(self._forget)

    def _forget(self, future: concurrent.futures.Future[None]) -> None:
        self._under_way.discard(future)
        result_or_none(future)

    def _settle(self, load: LoadUnderWay) -> None:
        order, report = load.order, load.report()
        del self._loads[order.request_id]
        self._failed_blocks |= failed_blocks(
            order.tokens, report.good, order.block_ids, block_tokens=self._block_tokens
        )
        self._load_reports.append(report)

    def _note_load(self, load: LoadUnderWay) -> None:
        with self._lock:
            self._ended_loads.append(load)
            self._load_ended.set()

    def _note_read(self, order: SaveOrder) -> None:
        self._read_later.end(order)
        self._load_ended.set()

    def _note_save(self, report: SaveReport, size: int) -> None:
        with self._lock:
            self._ended_saves.append((report, size))


async def _learn_calibration(kv: KVStore) -> None:
    """Ask which calibration there is: saves are coded on a device from the answer on, and do not wait for it."""
    with suppress(KVStoreError):  # they ask again
        await kv.calibrations.current()
