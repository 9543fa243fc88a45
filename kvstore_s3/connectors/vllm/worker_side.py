"""The half in the worker's process: moves KV between the engine's blocks and the store, between the steps."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from kvstore_s3.connectors.vllm.health import StoreHealth, result_or_none
from kvstore_s3.connectors.vllm.loads import Loader, LoadResult
from kvstore_s3.connectors.vllm.messages import LoadReport, SaveOrder, SaveReport, StepOrders, StepReport
from kvstore_s3.connectors.vllm.options import Options
from kvstore_s3.connectors.vllm.paged import PagedCache
from kvstore_s3.connectors.vllm.plans import failed_blocks
from kvstore_s3.connectors.vllm.saves import SaveBudget, Saver
from kvstore_s3.connectors.vllm.stats import Tally
from kvstore_s3.runtime import SyncKVStore

if TYPE_CHECKING:
    import torch

_IDLE_WAIT_S = 0.002
"""How long a step that computes nothing waits for a load to end. vLLM would spin, and take the cores from decoding."""


class WorkerSide:
    """All methods run on the worker's thread; results come over from the event loop under a lock."""

    def __init__(
        self, store: SyncKVStore, health: StoreHealth, options: Options, tally: Tally, *, block_tokens: int
    ) -> None:
        self._store = store
        self._health = health
        self._options = options
        self._tally = tally
        self._block_tokens = block_tokens
        self._budget = SaveBudget(options.save_memory_bytes)
        self._saver = Saver(store.kv, health, tally, on_end=self._note_save)
        self._writer = ThreadPoolExecutor(1, "kvstore-s3-pages")
        self._under_way: set[concurrent.futures.Future[None]] = set()
        self._loading: set[str] = set()
        self._broken: set[str] = set()
        self._lock = threading.Lock()
        self._load_ended = threading.Event()
        self._ended_loads: list[LoadResult] = []
        self._ended_saves: list[tuple[SaveReport, int]] = []
        self._failed_blocks: set[int] = set()
        self._load_reports: list[LoadReport] = []
        self._save_reports: list[SaveReport] = []

    def adopt(self, caches: Mapping[str, torch.Tensor]) -> None:
        """Take over vLLM's KV caches. Raises `UnsupportedModelError` where their pages are not understood."""
        layout = self._store.namespace.layout
        self._cache = PagedCache.adopt(caches, layout, self._block_tokens)
        self._loader = Loader(
            self._store.kv,
            self._cache,
            self._health,
            self._writer,
            deadline_s=self._options.load_deadline_s,
            on_end=self._note_load,
        )

    def start_loads(self, orders: StepOrders) -> None:
        for order in orders.loads:
            self._loading.add(order.request_id)
            self._track(self._store.runtime.submit(self._loader.load(order)))

    def start_saves(self, orders: StepOrders) -> None:
        """Copy what is to be saved out of the blocks now, while they surely hold it; the rest happens later."""
        for order in orders.saves:
            size = self._store.namespace.layout.bytes_per_token * (order.tokens.end - order.tokens.begin)
            if not self._may_save(order, size):
                self._broken.add(order.request_id)
                self._tally.add("kvstore_saves_shed")
                self._save_reports.append(SaveReport(order.save_id, stored=False))
                continue
            kv = self._cache.read(order.tokens, order.block_ids)
            self._track(self._store.runtime.submit(self._saver.save(order, kv)))

    def take_ended_loads(self, finished: set[str], *, idle: bool) -> set[str]:
        """Requests whose load has ended, well or not. `finished` requests are gone: their loads are cut short."""
        for request_id in finished & self._loading:
            self._store.runtime.submit(self._loader.abort(request_id))
        self._broken -= finished
        if idle:
            self._load_ended.wait(_IDLE_WAIT_S)
        with self._lock:
            self._load_ended.clear()
            loads, self._ended_loads = self._ended_loads, []
            saves, self._ended_saves = self._ended_saves, []
        for report, size in saves:
            self._budget.give_back(size)
            self._save_reports.append(report)
        return {self._settle(load) for load in loads}

    def take_failed_blocks(self) -> set[int]:
        """Blocks of ended loads that were not filled; the engine computes them."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_report(self) -> StepReport | None:
        """What the scheduler half has to know about ended loads and saves."""
        if not self._load_reports and not self._save_reports:
            return None
        report = StepReport(tuple(self._load_reports), tuple(self._save_reports))
        self._load_reports, self._save_reports = [], []
        return report

    def flush(self) -> None:
        """Wait for what is under way, at most `flush_s`; what is not done then is cancelled when the store closes."""
        concurrent.futures.wait(set(self._under_way), timeout=self._options.flush_s)

    def close(self) -> None:
        """Release the thread that writes blocks. To be called when the store is closed."""
        self._writer.shutdown()

    def _may_save(self, order: SaveOrder, size: int) -> bool:
        """A chunk is of no use without those before it, so a request that lost one saves no more."""
        return self._health.available and order.request_id not in self._broken and self._budget.take(size)

    def _track(self, future: concurrent.futures.Future[None]) -> None:
        self._under_way.add(future)
        future.add_done_callback(self._forget)

    def _forget(self, future: concurrent.futures.Future[None]) -> None:
        self._under_way.discard(future)
        result_or_none(future)

    def _settle(self, load: LoadResult) -> str:
        order = load.order
        self._loading.discard(order.request_id)
        self._failed_blocks |= failed_blocks(order.tokens, load.good, order.block_ids, block_tokens=self._block_tokens)
        self._tally.add("kvstore_tokens_loaded", load.good - order.tokens.begin)
        if load.good < order.tokens.end:
            self._tally.add("kvstore_loads_failed")
        self._load_reports.append(LoadReport(order.request_id, load.good, order.tokens.end))
        return order.request_id

    def _note_load(self, result: LoadResult) -> None:
        with self._lock:
            self._ended_loads.append(result)
            self._load_ended.set()

    def _note_save(self, report: SaveReport, size: int) -> None:
        with self._lock:
            self._ended_saves.append((report, size))
