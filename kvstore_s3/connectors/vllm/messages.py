"""What the two halves of the connector tell each other. vLLM carries it between the processes, once per step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from kvstore_s3.connectors.vllm.plans import TokenRange
from kvstore_s3.load import ChunkPlace
from kvstore_s3.streaming import Pace


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Fill `block_ids` with `tokens` of a request.

    `keys` are those of the chunks from `first_token`, a chunk boundary, on, and `places` where the store has them.
    `by_layer`: the step that follows waits for each layer. `follow`: `places` is empty, for the chunks are still being
    computed by another engine; those that come are loaded as they come.
    """

    request_id: str
    tokens: TokenRange
    block_ids: tuple[int, ...]
    first_token: int
    keys: tuple[bytes, ...]
    places: tuple[ChunkPlace, ...]
    pace: Pace | None
    by_layer: bool = False
    follow: bool = False


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """Save `tokens` of a request, whole chunks of these `keys`, which lie in `block_ids` after this step.

    `quality` is the worst of what they are or were computed from.
    """

    save_id: int
    request_id: str
    tokens: TokenRange
    block_ids: tuple[int, ...]
    keys: tuple[bytes, ...]
    quality: str


@dataclass(frozen=True, slots=True)
class StepOrders(KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler to worker. `idle_s`: this step computes nothing, and waits so long for a load to end; 0: not at all.

    `epoch` counts how often the engine's caches were reset: loads of an older one must not count any more. `preempted`
    requests have lost their blocks, from which saves may still be reading; `held` requests have ended, and their blocks
    are held until the worker says that no save reads them any more. `read_now`: none are, so this step ends when its
    saves have read what they need.
    """

    loads: tuple[LoadOrder, ...]
    saves: tuple[SaveOrder, ...]
    idle_s: float
    epoch: int = 0
    preempted: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    read_now: bool = False


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A load ended on one rank; the request's first `good` tokens are in its blocks. Fewer than ordered: it was cut.

    `reason` says why it was cut, else it is None. `quality` is the worst of what was loaded, `seconds` what it took;
    `near`: all of it came from this machine's tiers.
    """

    request_id: str
    good: int
    reason: str | None
    quality: str
    seconds: float
    near: bool


@dataclass(frozen=True, slots=True)
class SaveReport:
    """A save ended on one rank, and what it wrote. `end`: "stored", all of it is in the store now; "failed"; "shed"."""

    save_id: int
    end: str
    new_tokens: int = 0
    new_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LinkReport:
    """What a rank has measured: bytes/s of all its reads together (None: not yet), and seconds to a first byte."""

    bytes_per_s: float | None
    latency_s: float


@dataclass(frozen=True, slots=True)
class StepReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Worker to scheduler: what ended since the last step, of one rank or, joined, of several."""

    loads: tuple[LoadReport, ...]
    saves: tuple[SaveReport, ...]
    links: tuple[LinkReport, ...] = field(default=())

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        if not isinstance(other, StepReport):
            raise TypeError(f"a StepReport can be joined with another one only, not with {type(other).__name__}")
        return StepReport(self.loads + other.loads, self.saves + other.saves, self.links + other.links)
