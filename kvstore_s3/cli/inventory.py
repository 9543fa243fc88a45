"""What lies in a store: names of objects, namespaces, documents, calibrations. Shared by ls, stat and check."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from kvstore_s3.calibrations import CALIBRATION_FOLDER, CALIBRATION_JSON
from kvstore_s3.cli.options import require_store
from kvstore_s3.covers import cut_cover
from kvstore_s3.errors import DamagedObjectError, InvalidArgumentError, ObjectNotFoundError
from kvstore_s3.layout import Shard
from kvstore_s3.namespace import MAX_JSON_BYTES, Namespace
from kvstore_s3.objectstore.base import ObjectInfo, ObjectStore
from kvstore_s3.objectstore.open import open_store
from kvstore_s3.shards import SHARD_FOLDER

if TYPE_CHECKING:
    from kvstore_s3.config import Settings

NAMESPACE_JSON = "namespace.json"

_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_ARTEFACT = re.compile(r"([0-9a-f]{64})\.safetensors", re.ASCII)


@dataclass(frozen=True, slots=True)
class ObjectName:
    """An object key taken apart: that of a chunk has `key` and `shard`, that of a calibration its digest.

    A namespace's JSON documents have none of them; `names_calibration` is one of these, calibration.json. `marker` is
    the shard that a marker tells of.
    """

    namespace: str
    key: bytes | None = None
    shard: Shard | None = None
    calibration: bytes | None = None
    names_calibration: bool = False
    marker: Shard | None = None

    @property
    def is_chunk(self) -> bool:
        return self.key is not None


@dataclass(slots=True)
class NamespaceTotals:
    """What a listing says about one namespace. `values` counts KV values, 0 as long as the layout is unknown.

    `chunks` has the shards of each chunk, `markers` those that markers tell readers of. `calibrations` maps the digests
    of its artefacts to their bytes; `size` does not count these.
    """

    hex: str
    namespace: Namespace | None = None
    problem: str | None = None
    objects: int = 0
    size: int = 0
    values: int = 0
    chunks: dict[bytes, frozenset[Shard]] = field(default_factory=dict)
    shards: dict[Shard, int] = field(default_factory=dict)
    markers: set[Shard] = field(default_factory=set)
    calibrations: dict[bytes, int] = field(default_factory=dict)
    names_calibration: bool = False

    @property
    def tokens(self) -> int | None:
        return None if self.namespace is None else len(self.chunks) * self.namespace.chunk_tokens

    @property
    def incomplete(self) -> int:
        """How many chunks lack a part of the model: other ranks' saves were cut off, or have not come yet."""
        if self.namespace is None:
            return 0
        full = self.namespace.layout.full_shard
        parted = Counter(shards for shards in self.chunks.values() if full not in shards)
        return sum(count for shards, count in parted.items() if cut_cover(full, sorted(shards, key=str)) is None)

    @property
    def unmarked(self) -> list[Shard]:
        """Shards of objects that other partitions do not find, as their marker is not there."""
        if self.namespace is None:
            return []
        return [shard for shard in self.shards if shard not in {*self.markers, self.namespace.layout.full_shard}]

    @property
    def bits_per_value(self) -> float | None:
        return self.size * 8 / self.values if self.values else None


@asynccontextmanager
async def open_objects(settings: Settings) -> AsyncIterator[ObjectStore]:
    """The store of the settings, probed. Raises `StoreError` where it cannot be used."""
    objects = open_store(require_store(settings), settings)
    try:
        await objects.probe()
        yield objects
    finally:
        await objects.close()


def parse_name(object_key: str) -> ObjectName | None:
    """Take an object key apart; None where it is not a name that this package gives."""
    namespace, *rest = object_key.split("/")
    if _DIGEST.fullmatch(namespace) is None:
        return None
    if rest == [NAMESPACE_JSON]:
        return ObjectName(namespace)
    if rest == [CALIBRATION_JSON]:
        return ObjectName(namespace, names_calibration=True)
    if len(rest) == 2 and rest[0] == CALIBRATION_FOLDER:
        artefact = _ARTEFACT.fullmatch(rest[1])
        return ObjectName(namespace, calibration=bytes.fromhex(artefact[1])) if artefact else None
    if len(rest) != 2:
        return None
    try:
        if rest[0] == SHARD_FOLDER:
            return ObjectName(namespace, marker=Shard.parse(rest[1]))
        if _DIGEST.fullmatch(rest[0]) is None:
            return None
        return ObjectName(namespace, bytes.fromhex(rest[0]), Shard.parse(rest[1]))
    except InvalidArgumentError:
        return None


async def read_namespace(objects: ObjectStore, digest: str) -> Namespace:
    """Read and verify `<digest>/namespace.json`.

    Raises `ObjectNotFoundError` where there is none, and `InvalidArgumentError` where it is not that namespace.
    """
    name = f"{digest}/{NAMESPACE_JSON}"
    info = await objects.head(name)
    if info is None:
        raise ObjectNotFoundError(f"{name} is missing")
    if not 0 < info.size <= MAX_JSON_BYTES:
        raise InvalidArgumentError(f"it has {info.size} bytes, expected 1 to {MAX_JSON_BYTES}")
    text = bytearray(info.size)
    await objects.get_range(name, 0, memoryview(text))
    namespace = Namespace.from_json(bytes(text))
    if namespace.hex != digest or namespace.to_json().encode("ascii") != text:
        raise InvalidArgumentError("its content is not that of the namespace it is named after")
    return namespace


async def take_inventory(objects: ObjectStore, prefix: str = "") -> tuple[dict[str, NamespaceTotals], int]:
    """List the store and sum it up by namespace, with the number of objects that are not ours.

    `prefix` is the beginning of a namespace's digest. Memory grows with the number of chunks, 100 bytes each.
    """
    found: dict[str, NamespaceTotals] = {}
    foreign = 0
    async for info in objects.list(prefix):
        name = parse_name(info.key)
        if name is None:
            foreign += 1
            continue
        totals = found.get(name.namespace)
        if totals is None:
            totals = found[name.namespace] = NamespaceTotals(name.namespace)
            await _identify(objects, totals)
        _count(totals, name, info)
    return dict(sorted(found.items())), foreign


def choose_namespace(found: Iterable[str], prefix: str) -> str:
    """The one namespace that starts with `prefix`. Raises `InvalidArgumentError` where there is none, or several."""
    matches = [digest for digest in found if digest.startswith(prefix)]
    if not matches:
        raise InvalidArgumentError(f"no namespace starts with {prefix!r}; `kvstore-s3 ls` lists them")
    if len(matches) > 1:
        shown = ", ".join(match[:16] for match in matches[:4])
        raise InvalidArgumentError(f"{len(matches)} namespaces start with {prefix!r} ({shown}); give more digits")
    return matches[0]


def check_prefix(prefix: str | None) -> str:
    """Return a namespace prefix in lower case, "" for all. Raises `InvalidArgumentError`."""
    digits = (prefix or "").lower()
    if prefix is not None and re.fullmatch(r"[0-9a-f]{1,64}", digits, re.ASCII) is None:
        raise InvalidArgumentError(f"--namespace: expected 1 to 64 hex digits of a digest, not {prefix!r}")
    return digits


def fits_layout(shard: Shard, namespace: Namespace) -> bool:
    return shard.layer_end <= namespace.layout.layers and shard.head_end <= namespace.layout.kv_heads


async def _identify(objects: ObjectStore, totals: NamespaceTotals) -> None:
    try:
        totals.namespace = await read_namespace(objects, totals.hex)
    except ObjectNotFoundError:
        totals.problem = "namespace.json is missing"
    except (InvalidArgumentError, DamagedObjectError) as error:
        totals.problem = f"namespace.json is damaged: {error}"


def _count(totals: NamespaceTotals, name: ObjectName, info: ObjectInfo) -> None:
    totals.names_calibration |= name.names_calibration
    if name.calibration is not None:
        totals.calibrations[name.calibration] = info.size
    if name.marker is not None:
        totals.markers.add(name.marker)
    if name.key is None or name.shard is None:
        return
    totals.objects += 1
    totals.size += info.size
    totals.chunks[name.key] = _add_shard(totals.chunks.get(name.key, frozenset()), name.shard)
    totals.shards[name.shard] = totals.shards.get(name.shard, 0) + 1
    if totals.namespace is not None and fits_layout(name.shard, totals.namespace):
        per_head = totals.namespace.chunk_tokens * totals.namespace.layout.head_dim
        totals.values += name.shard.layers * 2 * name.shard.heads * per_head


@lru_cache(maxsize=4096)
def _add_shard(shards: frozenset[Shard], shard: Shard) -> frozenset[Shard]:
    """Cached, so that all chunks of the same shards share one set."""
    return shards | {shard}
