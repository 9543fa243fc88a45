"""What the two halves of the connector tell each other. vLLM carries it between the processes, once per step."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from kvstore_s3.bitstream import Identity, SectionTable
from kvstore_s3.connectors.vllm.plans import TokenRange
from kvstore_s3.load import StoredChunk
from kvstore_s3.namespace import Namespace
from kvstore_s3.store import Hit, KVStore


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """A chunk that a lookup found, without what the other process knows itself (its namespace)."""

    object_key: str
    key: bytes
    table: SectionTable
    first_token: int

    @classmethod
    def of(cls, chunk: StoredChunk) -> ChunkPlace:
        return cls(chunk.object_key, chunk.identity.key, chunk.table, chunk.first_token)

    def to_chunk(self, namespace: Namespace) -> StoredChunk:
        layout = namespace.layout
        identity = Identity(namespace.digest, self.key, layout.full_shard, layout, namespace.chunk_tokens)
        return StoredChunk(self.object_key, identity, self.table, None, self.first_token)


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Fill `block_ids` with `tokens` of a request. `places` are the chunks from `first_token`, a chunk boundary, on."""

    request_id: str
    tokens: TokenRange
    block_ids: tuple[int, ...]
    first_token: int
    places: tuple[ChunkPlace, ...]

    def to_hit(self, kv: KVStore) -> Hit:
        """A hit of `places` alone: its token 0 is the request's `first_token`."""
        return kv.make_hit([place.to_chunk(kv.namespace) for place in self.places])


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """Save `tokens` of a request, which lie in `block_ids` after this step.

    `prompt` holds the token ids from 0 to `tokens.end`, little-endian u32: a chunk's key names its whole prefix.
    """

    save_id: int
    request_id: str
    tokens: TokenRange
    block_ids: tuple[int, ...]
    prompt: bytes
    salt: str | None


@dataclass(frozen=True, slots=True)
class StepOrders(KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler to worker. `idle`: this step computes nothing, and the scheduler waits for lookups or loads."""

    loads: tuple[LoadOrder, ...]
    saves: tuple[SaveOrder, ...]
    idle: bool


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A load ended; the request's first `good` tokens are in the engine's blocks. Fewer than ordered: it failed."""

    request_id: str
    good: int
    ordered: int


@dataclass(frozen=True, slots=True)
class SaveReport:
    """A save ended; `stored` says whether all of it is in the store now."""

    save_id: int
    stored: bool


@dataclass(frozen=True, slots=True)
class StepReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Worker to scheduler: what ended since the last step."""

    loads: tuple[LoadReport, ...]
    saves: tuple[SaveReport, ...]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        if not isinstance(other, StepReport):
            raise TypeError(f"a StepReport can be joined with another one only, not with {type(other).__name__}")
        return StepReport(self.loads + other.loads, self.saves + other.saves)
