"""vLLM's own scheduler, block manager and connector factory around a model that is a formula (`rig_model`).

Everything that decides is real: `Scheduler`, `KVCacheManager`, `KVOutputAggregator`, the order of calls of a model
runner's step, the connector with both halves. Nothing is computed, so thousands of requests take seconds, and before
and after each step every block is compared with what it must hold.
"""

from __future__ import annotations

import copy
import pickle
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import pytest
import vllm.distributed.kv_transfer.kv_transfer_state as transfer_state
from connectors.vllm.rig_model import VOCABULARY, Formula, RankPages, Shape, extend_prefix, next_token, prefixes_of
from connectors.vllm.rig_store import Faults, FaultyStore
from vllm import SamplingParams
from vllm.config import KVTransferConfig, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from kvstore_s3.codec.device.decoder import DeviceDecoder
from kvstore_s3.connectors.vllm.measures import parse_key
from kvstore_s3.layout import dtype_name

SCHEDULER_CALLS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished_all_groups",
    "get_kv_connector_stats",
    "has_pending_push_work",
    "has_pending_block_frees",
    "take_events",
    "reset_cache",
)
"""Every call of the connector on the scheduler's thread."""


@dataclass(frozen=True)
class RigOptions:
    """How the engine is set up."""

    shape: Shape = field(default_factory=Shape)
    chunk_tokens: int = 48
    blocks: int = 64
    step_tokens: int = 192
    running: int = 8
    longest: int = 1024
    prefix_caching: bool = True
    ranks: int = 1
    watched: bool = True
    """Whether all blocks are compared before and after each step; what requests use is compared in any case."""
    measured: bool = False
    """Whether the speed of this engine, which computes nothing, decides what is worth a lookup or a load."""
    extra: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    """Settings, as the environment gives them: without KVSTORE_S3_, in capitals."""
    decoder: DeviceDecoder | None = None
    """Takes the place of a GPU's, for pages of `shape.on_device`."""
    processes: bool = True
    """Whether the engine believes to be in a process of its own, where steps go on while blocks are held."""


@dataclass
class Asked:
    """A request as the rig follows it."""

    request: Request
    salt: str | None
    weights: int
    prefixes: list[int]
    asked_at: float
    tokens: list[int] = field(default_factory=list)
    kept: int = 0
    """How many of `tokens` are of weights that the engine has no more."""
    aborted: bool = False
    loaded: int = 0
    """Tokens from the store that the client is told of."""


class Rig:
    """An engine in one thread. Use as a context manager; leaving it closes the connector and checks nothing.

    `spent` and `worked` are the seconds that each call on the scheduler's thread took, by the clock and of the CPU.
    `faults` are those of the scheduler's store, `rank_faults` of each rank's: the same ones, unless others are given.
    """

    def __init__(
        self,
        store: str,
        options: RigOptions | None = None,
        faults: Faults | None = None,
        rank_faults: Sequence[Faults] = (),
    ) -> None:
        self.options = options = options or RigOptions()
        self.formula = Formula(options.shape)
        self.faults = self._opening = faults or Faults()
        self.rank_faults = tuple(rank_faults) or (self.faults,) * options.ranks
        self.spent: dict[str, list[float]] = {name: [] for name in SCHEDULER_CALLS}
        self.worked: dict[str, list[float]] = {name: [] for name in SCHEDULER_CALLS}
        self.counts: dict[str, float] = {}
        self.asked: dict[str, Asked] = {}
        self.finished: dict[str, Asked] = {}
        self.external: dict[str, int] = {}
        self.steps = 0
        self.weights = 0
        self._store = store
        self._stack = ExitStack()
        self._number = 0
        self._loads_of_step: list[tuple[str, bool]] = []
        self._after_dispatch: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._patch_environment(stack.enter_context(pytest.MonkeyPatch.context()))
            self.config = self._make_config()
            self._kv_config = self._make_kv_config()
            stack.enter_context(set_current_vllm_config(self.config))
            init_none_hash(sha256)
            self._hasher = get_request_block_hasher(self.options.shape.block_tokens, sha256)
            self.scheduler = Scheduler(
                vllm_config=self.config,
                kv_cache_config=self._kv_config,
                structured_output_manager=StructuredOutputManager(self.config),
                block_size=self.options.shape.block_tokens,
                log_stats=True,
            )
            stack.callback(self.scheduler.shutdown)
            self._watch_connector()
            self._watch_pool()
            self.ranks = [self._make_rank(rank, stack) for rank in range(self.options.ranks)]
            self._aggregator = KVOutputAggregator.from_connector(self.scheduler.connector, self.options.ranks)
            self._stack = stack.pop_all()
        self.free_blocks = self.pool.get_num_free_blocks()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    def ask(
        self,
        prompt: Sequence[int],
        *,
        answer: int = 4,
        salt: str | None = None,
        transfer: dict[str, Any] | None = None,
        **fields: Any,
    ) -> str:
        """Add a request; returns its id. `transfer` is what a proxy says of it (kv_transfer_params)."""
        self._number += 1
        request = Request(
            f"r{self._number}",
            list(prompt),
            SamplingParams(
                temperature=0,
                max_tokens=answer,
                ignore_eos=True,
                extra_args={"kv_transfer_params": transfer} if transfer else None,
            ),
            None,
            cache_salt=salt,
            block_hasher=self._hasher,
            **fields,
        )
        asked = Asked(request, salt, self.weights, prefixes_of(prompt, salt, self.weights), time.monotonic())
        self.asked[request.request_id] = asked
        self.scheduler.add_request(request)
        return request.request_id

    def abort(self, request_id: str) -> None:
        """As when a client hangs up. May be called between steps and, by `during`, in the middle of one."""
        asked = self.asked.pop(request_id, None)
        if asked is not None:
            asked.aborted = True
            self.scheduler.finish_requests([request_id], RequestStatus.FINISHED_ABORTED)

    def change_weights(self, *, preempt: bool = True) -> bool:
        """Between steps: the model is another one from now on, and the engine's caches are reset.

        vLLM preempts what runs, unless it is told not to: then a request goes on from KV of the old weights. Returns
        False, with nothing changed, where vLLM refuses to as long as loads are under way.
        """
        if preempt:
            try:
                self.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
            except RuntimeError:
                return False
        else:
            self.scheduler.reset_prefix_cache(reset_connector=True)
        self.weights += 1
        for asked in self.asked.values():
            assert asked.tokens == self.expected_answer(asked)[: len(asked.tokens)]
            asked.kept = len(asked.tokens)
            done = self._computed_for_good(asked.request)
            numbers = self._prefixes(asked.request)[: done + 1] if done else prefixes_of((), asked.salt, self.weights)
            mixed = extend_prefix(numbers[-1], -self.weights) if done else numbers[-1]
            for token in asked.request.all_token_ids[done:]:
                mixed = extend_prefix(mixed, token)
                numbers.append(mixed)
            asked.prefixes, asked.weights = numbers, self.weights
        return True

    def _computed_for_good(self, request: Request) -> int:
        """Tokens whose KV is in the request's blocks, not still to come from the store."""
        loading = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
        if loading and request.request_id not in self.scheduler.finished_recving_kv_req_ids:
            return 0
        return request.num_computed_tokens

    def status(self, request_id: str) -> RequestStatus | None:
        request = self.scheduler.requests.get(request_id)
        return request.status if request else None

    def step(self, during: Callable[[], None] | None = None) -> bool:
        """One step of the engine core; `during` runs after the forward pass and before its output is processed.

        Returns whether anything was computed.
        """
        self.steps += 1
        self._check_untouched("before a step")
        self._loads_of_step.clear()
        output = self.scheduler.schedule()
        sampled = {name: token for name in output.num_scheduled_tokens if (token := self._sample(name, output))}
        spoilt: set[str] = set()
        results = [self._execute(rank, output, spoilt) for rank in self.ranks]
        sampled |= {name: [VOCABULARY] for name in spoilt & set(sampled)}
        runner_output = self._join(results, list(output.num_scheduled_tokens), sampled)
        if during is not None:
            during()
        self._take(self.scheduler.update_from_output(output, runner_output))
        self._check_untouched("after a step")
        return bool(output.total_num_scheduled_tokens)

    def run(
        self,
        *,
        limit_s: float = 200.0,
        until: Callable[[], bool] | None = None,
        during: Callable[[], None] | None = None,
    ) -> None:
        """Step until nothing is left to do, or `until` says so. Fails where that takes longer than `limit_s`."""
        end = time.monotonic() + limit_s
        while self.scheduler.has_requests() if until is None else not until():
            self.step(during)
            assert time.monotonic() < end, f"stuck: {self._describe()}"

    def loaded_tokens(self, request_id: str) -> int:
        """How many tokens of an answered request came from the store."""
        return self.finished[request_id].loaded

    def check_nothing_left(self) -> None:
        """Every block, load and request is back where it belongs."""
        assert not self.asked, self._describe()
        assert not self.scheduler.requests, self._describe()
        assert self.pool.get_num_free_blocks() == self.free_blocks, "blocks were lost"
        for rank in self.ranks:
            assert not rank.pages.loading
            assert not rank.connector._worker._loads, "a rank goes on loading"
        half = self.scheduler.connector._scheduler
        assert not half._loads.any, "the scheduler's half waits for loads that are over"
        assert not half._held, "the scheduler's half holds blocks of requests that are gone"
        assert not half._requests, "the scheduler's half remembers requests that are gone"

    def until(self, request_id: str, status: RequestStatus) -> Callable[[], bool]:
        """For `run`: the request has come to `status`, or has ended without (a busy machine may be late for a load)."""
        return lambda: request_id not in self.asked or self.status(request_id) == status

    def _describe(self) -> str:
        states = {name: str(request.status) for name, request in self.scheduler.requests.items()}
        return f"{states}; free blocks {self.pool.get_num_free_blocks()} of {self.free_blocks}"

    def _take(self, outputs: dict[int, Any]) -> None:
        for answer in outputs[0].outputs if 0 in outputs else ():
            asked = self.asked.get(answer.request_id)
            if asked is None:
                continue
            asked.tokens += answer.new_token_ids
            if answer.finish_reason is not None:
                del self.asked[answer.request_id]
                asked.loaded = (answer.kv_transfer_params or {}).get("kvstore_s3", {}).get("loaded_tokens", 0)
                self.finished[answer.request_id] = asked
                assert str(answer.finish_reason) == "length", f"{answer.request_id} ended by {answer.finish_reason}"
                assert asked.tokens == self.expected_answer(asked), f"{answer.request_id} got a wrong answer"
        stats = outputs[0].scheduler_stats if 0 in outputs else None
        for series, value in ((stats and stats.kv_connector_stats) or {}).items():
            if isinstance(value, (int, float)):
                name = parse_key(series).name
                self.counts[name] = self.counts.get(name, 0) + value

    def expected_answer(self, asked: Asked) -> list[int]:
        """All tokens that the request is to be answered with; those of weights that are gone as they came."""
        tokens = asked.tokens[: asked.kept]
        prefix = asked.prefixes[len(asked.request.prompt_token_ids) + asked.kept]
        for _ in range(asked.request.max_tokens - asked.kept):
            tokens.append(next_token(prefix))
            prefix = extend_prefix(prefix, tokens[-1])
        return tokens

    def _prefixes(self, request: Request) -> list[int]:
        numbers = self.asked[request.request_id].prefixes
        for token in request.all_token_ids[len(numbers) - 1 :]:
            numbers.append(extend_prefix(numbers[-1], token))
        return numbers

    def _sample(self, request_id: str, output: Any) -> list[int]:
        request = self.scheduler.requests[request_id]
        # `schedule` has already counted what this step computes.
        done = request.num_computed_tokens
        return [next_token(self._prefixes(request)[done])] if done == request.num_tokens else []

    def _execute(self, rank: _Rank, output: Any, spoilt: set[str]) -> Any:
        """What a model runner does in a step, on one rank."""
        output = replace(output, kv_connector_metadata=pickle.loads(pickle.dumps(output.kv_connector_metadata)))
        transfer_state._KV_CONNECTOR_AGENT = rank.connector
        self._open_loads(rank)
        try:
            rank.connector.handle_preemptions(output.kv_connector_metadata)
            if not output.num_scheduled_tokens:
                result = KVConnectorModelRunnerMixin.kv_connector_no_forward(output, self.config).kv_connector_output
                wrong: dict[str, set[int]] = {}
            else:
                with (
                    set_forward_context(None, self.config),
                    KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(output) as result,
                ):
                    wrong = self._forward(rank, output)
        finally:
            transfer_state._KV_CONNECTOR_AGENT = None
        invalid = result.invalid_block_ids if result else set()
        for name, blocks in wrong.items():  # vLLM forgets the step of a request that has a block which is reported
            assert invalid & set(self._used_blocks(name, output)), f"{name} computed from wrong KV in blocks {blocks}"
            spoilt.add(name)
        for name in (result.finished_recving or ()) if result else ():
            rank.pages.close_to_load(name)
        for name, is_async in self._loads_of_step:
            if not is_async:
                rank.pages.close_to_load(name)
        return pickle.loads(pickle.dumps(result))

    def _open_loads(self, rank: _Rank) -> None:
        for name, _ in self._loads_of_step:
            rank.pages.open_to_load(name, self._load_blocks[name])

    def _forward(self, rank: _Rank, output: Any) -> dict[str, set[int]]:
        """Layer by layer: wait, compute, look at what that used. Returns whose KV was wrong, in which blocks."""
        wrong: dict[str, set[int]] = {}
        for layer, name in enumerate(rank.layer_names):
            rank.connector.wait_for_layer_load(name)
            work = list(self._work(output))
            for request_id, table, prefixes, begin, end in work:  # a request may go on from what another computes now
                if request_id in wrong:
                    rank.pages.spoil(layer, table, begin, end)
                else:
                    rank.pages.write(layer, table, prefixes, begin, end)
            for request_id, table, prefixes, begin, _ in work:
                if blocks := set(rank.pages.wrong_blocks(layer, table, prefixes, begin)):
                    wrong.setdefault(request_id, set()).update(blocks)
            rank.connector.save_kv_layer(name, rank.pages.tensor[layer], None)
        return wrong

    def _used_blocks(self, request_id: str, output: Any) -> list[int]:
        """Blocks of the tokens that were computed before this step."""
        begin = self.scheduler.requests[request_id].num_computed_tokens - output.num_scheduled_tokens[request_id]
        (table,) = self.scheduler.kv_cache_manager.get_block_ids(request_id)
        return table[: -(-begin // self.options.shape.block_tokens)]

    def _work(self, output: Any) -> Iterator[tuple[str, list[int], list[int], int, int]]:
        for request_id, scheduled in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            (table,) = self.scheduler.kv_cache_manager.get_block_ids(request_id)
            end = request.num_computed_tokens
            yield request_id, table, self._prefixes(request), end - scheduled, end

    def _join(self, results: list[Any], names: list[str], sampled: dict[str, list[int]]) -> ModelRunnerOutput:
        outputs = [
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=[sampled.get(name, []) for name in names],
                kv_connector_output=result,
            )
            for result in results
        ]
        return outputs[0] if len(outputs) == 1 else self._aggregator.aggregate(outputs)

    def _check_untouched(self, when: str) -> None:
        for rank in self.ranks if self.options.watched else ():
            rank.pages.check_untouched(f"step {self.steps}, {when}")

    def _watch_connector(self) -> None:
        """Time every call on the scheduler's thread, and note what it promises."""
        connector: Any = self.scheduler.connector
        for name in SCHEDULER_CALLS:
            setattr(connector, name, self._timed(name, getattr(connector, name)))
        match, allocate = connector.get_num_new_matched_tokens, connector.update_state_after_alloc
        promised: dict[str, tuple[int, bool]] = {}
        self._load_blocks: dict[str, list[int]] = {}

        def note_match(request: Request, computed: int) -> tuple[int | None, bool]:
            found, is_async = match(request, computed)
            promised[request.request_id] = (computed, is_async)
            return found, is_async

        def note_allocation(request: Request, blocks: Any, external: int) -> None:
            allocate(request, blocks, external)
            if external:
                begin, is_async = promised[request.request_id]
                size = self.options.shape.block_tokens
                table = blocks.get_block_ids()[0]
                name = request.request_id
                self._load_blocks[name] = table[begin // size : -(-(begin + external) // size)]
                self._loads_of_step.append((name, is_async))
                self.external[name] = self.external.get(name, 0) + external

        connector.get_num_new_matched_tokens, connector.update_state_after_alloc = note_match, note_allocation

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        spent, worked = self.spent[name], self.worked[name]

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin, begin_work = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - begin)
                worked.append(time.thread_time() - begin_work)

        return timed

    def _watch_pool(self) -> None:
        allocate = self.pool.get_new_blocks

        def get_new_blocks(count: int) -> Any:
            blocks = allocate(count)
            self._check_untouched("when blocks are handed out")
            for rank in self.ranks:
                rank.pages.poison([block.block_id for block in blocks])
            return blocks

        self.pool.get_new_blocks = get_new_blocks

    def _make_rank(self, rank: int, stack: ExitStack) -> _Rank:
        config = self.config
        if self.options.ranks > 1:
            config = copy.deepcopy(self.config)
            config.parallel_config.rank = rank
        heads = self.options.shape.heads // self.options.ranks
        pages = RankPages(
            self.formula,
            self.options.blocks,
            slice(0, self.options.shape.layers),
            slice(rank * heads, (rank + 1) * heads),
        )
        self._opening = self.rank_faults[rank]
        connector = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, self._kv_config)
        stack.callback(connector.shutdown)
        names = self._layer_names()
        connector.register_kv_caches(dict(zip(names, pages.tensor, strict=True)))
        return _Rank(connector, pages, names)

    def _layer_names(self) -> list[str]:
        return [f"model.layers.{layer}.self_attn.attn" for layer in range(self.options.shape.layers)]

    def _patch_environment(self, patch: pytest.MonkeyPatch) -> None:
        patch.setenv("KVSTORE_S3_CACHE_DIR", _DIRECTORY.name)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(self.options.processes)))
        for name, value in self.options.settings.items():
            patch.setenv(f"KVSTORE_S3_{name}", value)
        if self.options.decoder is not None:
            found = self.options.decoder
            patch.setattr("kvstore_s3.connectors.vllm.worker_side.engine_device", lambda _: found)
            patch.setattr("kvstore_s3.connectors.vllm.parts.keeps_kv_on_device", lambda: True)
        if not self.options.measured:
            patch.setattr("kvstore_s3.connectors.vllm.costs.PrefillMeter.end_step", lambda *_: None)
        if self._store.startswith("faulty://"):
            name = self._store.removeprefix("faulty://")
            patch.setattr("kvstore_s3.store.open_store", lambda *_, **__: FaultyStore(name, self._opening))

    def _make_config(self) -> Any:
        options = self.options
        store = self._store.replace("faulty://", "file:///faulty/")
        config = copy.deepcopy(engine_config(replace(options.shape, block_tokens=32)))
        config.kv_transfer_config = KVTransferConfig(
            kv_connector="KVStoreS3Connector",
            kv_connector_module_path="kvstore_s3.connectors.vllm",
            kv_role="kv_both",
            kv_connector_extra_config={
                "store": store,
                "chunk_tokens": options.chunk_tokens,
                "admission": "cost" if options.measured else "always",
                "lookup_deadline_s": 60.0,  # on a machine that is overloaded, too
                **options.extra,
            },
        )
        config.cache_config.block_size = options.shape.block_tokens
        if options.shape.is_fp8:
            config.cache_config.cache_dtype = "fp8"
        config.cache_config.num_gpu_blocks = options.blocks
        config.cache_config.enable_prefix_caching = options.prefix_caching
        config.scheduler_config.max_num_batched_tokens = options.step_tokens
        config.scheduler_config.max_num_seqs = options.running
        config.model_config.max_model_len = options.longest
        config.parallel_config.tensor_parallel_size = options.ranks
        config.parallel_config.world_size = options.ranks
        return config

    def _make_kv_config(self) -> KVCacheConfig:
        shape, names = self.options.shape, self._layer_names()
        spec = FullAttentionSpec(
            block_size=shape.block_tokens,
            num_kv_heads=shape.heads // self.options.ranks,
            head_size=shape.head_dim,
            dtype=shape.page_dtype,
        )
        page = spec.page_size_bytes
        stride = page * self.options.blocks
        tensor = KVCacheTensor(stride * len(names), names, layer_stride=stride, block_stride=page)
        return KVCacheConfig(self.options.blocks, [tensor], [KVCacheGroupSpec(names, spec)])


@dataclass(frozen=True)
class _Rank:
    connector: Any
    pages: RankPages
    layer_names: list[str]


@cache
def engine_config(shape: Shape) -> Any:
    """vLLM's configuration for a model of this shape. Made once: that takes seconds."""
    arguments = EngineArgs(model=str(model_of(shape)), dtype=dtype_name(shape.model_dtype), skip_tokenizer_init=True)
    return arguments.create_engine_config()


@cache
def model_of(shape: Shape) -> Path:
    """A model directory of this shape, with weights that nobody uses: it gives the namespace."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        max_position_embeddings=262144,
        dtype=dtype_name(shape.model_dtype),
    )
    path = Path(_DIRECTORY.name) / f"llama-{len(list(Path(_DIRECTORY.name).iterdir()))}"
    transformers.LlamaForCausalLM(config).to(shape.model_dtype).save_pretrained(path)
    return path


_DIRECTORY = TemporaryDirectory(prefix="kvstore-s3-rig-")


def tokens(count: int, *, seed: int = 0) -> list[int]:
    """A prompt."""
    chance = random.Random(seed)
    return [chance.randrange(1000) for _ in range(count)]
