"""KVStoreS3Connector: what vLLM loads. It checks, opens the store, and hands each call to the half it belongs to."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from kvstore_s3.config import load_settings
from kvstore_s3.connectors.vllm.cores import spread_over_cores
from kvstore_s3.connectors.vllm.feeds import StoreFeed
from kvstore_s3.connectors.vllm.health import log, speak_through_engine
from kvstore_s3.connectors.vllm.messages import StepOrders, StepReport
from kvstore_s3.connectors.vllm.options import Options
from kvstore_s3.connectors.vllm.parts import (
    make_scheduler_side,
    make_worker_side,
    scheduler_settings,
    worker_settings,
)
from kvstore_s3.connectors.vllm.ranks import shard_of_rank
from kvstore_s3.connectors.vllm.refusals import check_engine, check_load_mode, check_store, make_namespace
from kvstore_s3.connectors.vllm.stats import StorePromMetrics, StoreStats, Tally
from kvstore_s3.runtime import connect

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvstore_s3.connectors.vllm.scheduler_side import SchedulerSide
    from kvstore_s3.connectors.vllm.worker_side import WorkerSide


_open_connectors: WeakSet[KVStoreS3Connector] = WeakSet()


def _shut_down_all() -> None:
    for connector in list(_open_connectors):
        connector.shutdown()


# An engine in the caller's own process is never told to shut down. Thread pools take no more work once threading's own
# exit functions have run, the last registered first, and those of atexit run later: too late to finish a save.
getattr(threading, "_register_atexit", atexit.register)(_shut_down_all)


class KVStoreS3Connector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Saves whole chunks of prompts to a KV store and loads them between steps, in this engine or another.

    vLLM makes one in the scheduler's process and one in each worker's. Raises `UnsupportedModelError` for engines it
    cannot serve and `InvalidArgumentError` for a configuration it does not understand. It is no `SupportsHMA` for
    serving hybrid caches, which it refuses by name, but so that vLLM does not rearrange them first.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_engine(vllm_config, kv_cache_config)
        speak_through_engine()
        settings = load_settings()
        options = Options.parse(vllm_config.kv_transfer_config.kv_connector_extra_config, settings)
        check_store(options)
        check_load_mode(vllm_config, options)
        namespace = make_namespace(vllm_config, kv_cache_config, options.chunk_tokens)
        _open_connectors.add(self)
        self._resources = ExitStack()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            # vLLM reads the policy after it has made the connector. "fail", its default, would end requests with an
            # error where computing the tokens gives the answer.
            vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
            self._tally = Tally("scheduler")
            store = self._resources.enter_context(
                connect(options.store, namespace, scheduler_settings(settings, options), probe=False)
            )
            self._scheduler = make_scheduler_side(
                vllm_config, kv_cache_config, store, options, settings, self._tally, self._resources
            )
        else:
            shard = shard_of_rank(vllm_config, namespace.layout)
            self._tally = Tally(f"rank {vllm_config.parallel_config.rank}")
            store = self._resources.enter_context(
                connect(
                    options.store,
                    namespace,
                    worker_settings(settings, options),
                    probe=False,
                    shard=shard,
                    initializer=spread_over_cores,
                )
            )
            self._worker = make_worker_side(vllm_config, kv_cache_config, store, options, self._tally)
            self._resources.callback(self._worker.flush)
        self._feed = StoreFeed(store.kv, self._tally)

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a miss later on, no more."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """A layer that waits for its KV cannot be inside a CUDA graph."""
        return extra_config.get("load_mode") == "by-layer"

    def shutdown(self) -> None:
        """Finish saves for a moment, then close the store. Safe to call twice."""
        self._resources.close()
        if self._worker is not None:
            self._worker.close()

    # Worker's process, in the order of a step.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._as_worker().adopt(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """The first call of a step: what is to be loaded may be on its way while it computes."""
        self._as_worker().begin_step(_as_orders(kv_connector_metadata))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._as_worker().let_write(self._orders())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait for loads by layer. Others need none: their requests are scheduled once all layers are there."""
        self._as_worker().wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to do: blocks are copied once all layers of a step are there."""

    def wait_for_save(self) -> None:
        self._as_worker().start_saves(self._orders())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        ended = self._as_worker().take_ended_loads(finished_req_ids, idle_s=self._orders().idle_s)
        return KVConnectorTransferResults(finished_sending=self._as_worker().take_unread(), finished_recving=ended)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._as_worker().take_failed_blocks()

    def build_connector_worker_meta(self) -> StepReport | None:
        return self._as_worker().take_report()

    # Scheduler's process.

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._as_scheduler().bind(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        self._as_scheduler().add_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._as_scheduler().count_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._as_scheduler().order_load(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._as_scheduler().build_orders(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, StepReport):
            self._as_scheduler().take_report(report)
        self._as_scheduler().let_go(connector_output.finished_sending or ())

    def take_events(self) -> Iterable[KVCacheEvent]:
        """vLLM asks once for each step, when it has its results."""
        return self._as_scheduler().end_step()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        held = self._as_scheduler().hold_blocks(request.request_id)
        return held, self._as_scheduler().drop_request(request.request_id)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def has_pending_push_work(self) -> bool:
        """Whether steps must go on though no request is left: saves read blocks that are to be given back."""
        return self._as_scheduler().holds_blocks

    def has_pending_block_frees(self) -> bool:
        """Whether it is worth waiting for blocks rather than to preempt a request."""
        return self._as_scheduler().holds_blocks

    def reset_cache(self) -> bool:
        """vLLM wants nothing stale to be read, after new weights for one. The store is shared, so it is left alone."""
        log.warning("the engine's caches were reset: from here on it uses a namespace of its own in the KV store")
        self._as_scheduler().start_epoch()
        return True

    # Both.

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._scheduler is not None:
            self._scheduler.measure()
            self._feed.feed()
        else:
            worker = self._as_worker()
            worker.measure()
            self._feed.feed(at_once=worker.has_report)
        return self._tally.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return StoreStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> KVConnectorPromMetrics:
        return StorePromMetrics(*args, **kwargs)

    def _orders(self) -> StepOrders:
        return _as_orders(self._get_connector_metadata())

    def _as_scheduler(self) -> SchedulerSide:
        if self._scheduler is None:
            raise RuntimeError("this half of the connector is the worker's")
        return self._scheduler

    def _as_worker(self) -> WorkerSide:
        if self._worker is None:
            raise RuntimeError("this half of the connector is the scheduler's")
        return self._worker


def _as_orders(metadata: KVConnectorMetadata) -> StepOrders:
    if not isinstance(metadata, StepOrders):
        raise TypeError(f"the scheduler's half sent {type(metadata).__name__} instead of StepOrders")
    return metadata
