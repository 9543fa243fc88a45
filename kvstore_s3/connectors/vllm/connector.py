"""KVStoreS3Connector: what vLLM loads. It checks, opens the store, and hands each call to the half it belongs to."""

from __future__ import annotations

import atexit
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from kvstore_s3.config import Settings, load_settings
from kvstore_s3.connectors.vllm.cores import spread_over_cores
from kvstore_s3.connectors.vllm.health import StoreHealth, log
from kvstore_s3.connectors.vllm.messages import StepOrders, StepReport
from kvstore_s3.connectors.vllm.options import Options
from kvstore_s3.connectors.vllm.refusals import check_engine, check_store, make_namespace
from kvstore_s3.connectors.vllm.scheduler_side import SchedulerSide
from kvstore_s3.connectors.vllm.stats import StorePromMetrics, StoreStats, Tally
from kvstore_s3.connectors.vllm.worker_side import WorkerSide
from kvstore_s3.runtime import SyncKVStore, connect

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvstore_s3.namespace import Namespace


_open_connectors: WeakSet[KVStoreS3Connector] = WeakSet()


def _shut_down_all() -> None:
    for connector in list(_open_connectors):
        connector.shutdown()


# An engine in the caller's own process is never told to shut down. Thread pools take no more work once threading's own
# exit functions have run, the last registered first, and those of atexit run later: too late to finish a save.
getattr(threading, "_register_atexit", atexit.register)(_shut_down_all)


class KVStoreS3Connector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Saves whole chunks of prompts to a KV store and loads them between steps, in this engine or another.

    vLLM makes one in the scheduler's process and one in the worker's. Raises `UnsupportedModelError` for engines it
    cannot serve and `InvalidArgumentError` for a configuration it does not understand. It is no `SupportsHMA` for
    serving hybrid caches, which it refuses by name, but so that vLLM does not rearrange them first.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_engine(vllm_config, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        settings = load_settings()
        options = Options.parse(transfer.kv_connector_extra_config, settings)
        check_store(options)
        self._tally = Tally()
        self._resources = ExitStack()
        store = self._open(make_namespace(vllm_config, kv_cache_config, options.chunk_tokens), options, settings)
        health = StoreHealth(store.kv.objects, settings)
        block_tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            # vLLM reads the policy after it has made the connector. "fail", its default, would end requests with an
            # error where computing the tokens gives the answer.
            transfer.kv_load_failure_policy = "recompute"
            self._scheduler = SchedulerSide(
                store,
                health,
                options,
                self._tally,
                block_tokens=block_tokens,
                loads=transfer.is_kv_consumer,
                saves=transfer.is_kv_producer,
            )
            store.runtime.submit(health.check())
            log.info(
                "KV store %s, namespace %s, profile %s", store.kv.objects.url, store.namespace.hex, options.profile
            )
        else:
            store.runtime.submit(spread_over_cores())
            self._worker = WorkerSide(store, health, options, self._tally, block_tokens=block_tokens)
            self._resources.callback(self._worker.flush)

    def _open(self, namespace: Namespace, options: Options, settings: Settings) -> SyncKVStore:
        _open_connectors.add(self)
        settings = settings.model_copy(update={"profile": options.profile})
        return self._resources.enter_context(connect(options.store, namespace, settings, probe=False))

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a miss later on, no more."""
        return False

    def shutdown(self) -> None:
        """Finish saves for a moment, then close the store. Safe to call twice."""
        self._resources.close()
        if self._worker is not None:
            self._worker.close()

    # Worker's process, in the order of a step.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._as_worker().adopt(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._as_worker().start_loads(self._orders())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request is scheduled only after all of its layers were loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to do: blocks are copied once all layers of a step are there."""

    def wait_for_save(self) -> None:
        self._as_worker().start_saves(self._orders())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        ended = self._as_worker().take_ended_loads(finished_req_ids, idle=self._orders().idle)
        return KVConnectorTransferResults(finished_recving=ended)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._as_worker().take_failed_blocks()

    def build_connector_worker_meta(self) -> StepReport | None:
        return self._as_worker().take_report()

    # Scheduler's process.

    def on_new_request(self, request: Request) -> None:
        self._as_scheduler().add_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._as_scheduler().count_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._as_scheduler().order_load(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._as_scheduler().build_orders(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, StepReport):
            self._as_scheduler().take_report(report)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._as_scheduler().drop_request(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def reset_cache(self) -> bool:
        """vLLM wants nothing stale to be read, after new weights for one. The store is shared, so it is left alone."""
        log.warning("the prefix cache was reset with its connector: this engine uses the KV store no more")
        self._as_scheduler().turn_off()
        return True

    # Both.

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return self._tally.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return StoreStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> KVConnectorPromMetrics:
        return StorePromMetrics(*args, **kwargs)

    def _orders(self) -> StepOrders:
        orders = self._get_connector_metadata()
        if not isinstance(orders, StepOrders):
            raise TypeError(f"the scheduler's half sent {type(orders).__name__} instead of StepOrders")
        return orders

    def _as_scheduler(self) -> SchedulerSide:
        if self._scheduler is None:
            raise RuntimeError("this half of the connector is the worker's")
        return self._scheduler

    def _as_worker(self) -> WorkerSide:
        if self._worker is None:
            raise RuntimeError("this half of the connector is the scheduler's")
        return self._worker
