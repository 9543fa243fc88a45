"""An object store that fails on purpose, in memory: slow, out, short-lived, damaged."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from kvstore_s3.errors import ObjectNotFoundError, StoreBusyError, StoreUnavailableError
from kvstore_s3.objectstore.base import Buffer, ObjectInfo
from kvstore_s3.objectstore.memory import MemoryStore


@dataclass
class Faults:
    """What goes wrong, and how often; may be changed while the store is in use. Shares are of 1."""

    seed: int = 0
    delay_s: tuple[float, float] = (0.0, 0.0)
    """Shortest and longest time that a request takes."""
    slow_reads_s: float = 0.0
    """What reading takes beyond that."""
    unavailable: float = 0.0
    busy: float = 0.0
    damaged: float = 0.0
    """Reads whose bytes are not those that were stored."""
    vanished: float = 0.0
    """Reads of an object that is not there any more."""
    out: bool = False
    """Every request fails at once."""
    calls: dict[str, int] = field(default_factory=dict)
    created: list[str] = field(default_factory=list)
    """Keys of objects that were not there before."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()

    def clear(self) -> None:
        """The store is well from now on."""
        self.delay_s, self.slow_reads_s, self.out = (0.0, 0.0), 0.0, False
        self.unavailable = self.busy = self.damaged = self.vanished = 0.0

    @property
    def chunks_created(self) -> int:
        """Objects of chunks among `created`; each has a name such as l0-2.h0-2."""
        return sum(key.rpartition("/")[2].startswith("l0-") and "/shards/" not in key for key in self.created)

    def throw(self, share: float) -> bool:
        with self._lock:
            return self._random.random() < share

    def count(self, name: str) -> None:
        with self._lock:
            self.calls[name] = self.calls.get(name, 0) + 1

    def pick_delay(self) -> float:
        with self._lock:
            return self._random.uniform(*self.delay_s)


class FaultyStore:
    """An `ObjectStore` over a `MemoryStore` that all who name it share."""

    def __init__(self, name: str, faults: Faults) -> None:
        self._inner = MemoryStore(name)
        self._faults = faults

    @property
    def url(self) -> str:
        return self._inner.url

    async def probe(self) -> None:
        await self._meet("probe")
        await self._inner.probe()

    async def put(
        self, key: str, data: Buffer, *, metadata: Mapping[str, str] | None = None, replace: bool = False
    ) -> bool:
        await self._meet("put")
        created = await self._inner.put(key, data, metadata=metadata, replace=replace)
        if created:
            self._faults.created.append(key)
        return created

    async def head(self, key: str) -> ObjectInfo | None:
        await self._meet("head")
        return await self._inner.head(key)

    async def get_range(self, key: str, start: int, into: memoryview) -> None:
        await self._meet("get")
        await asyncio.sleep(self._faults.slow_reads_s)
        if self._faults.throw(self._faults.vanished):
            await self._inner.delete(key)
            raise ObjectNotFoundError(f"{self.url}: {key} has vanished")
        await self._inner.get_range(key, start, into)
        if self._faults.throw(self._faults.damaged):
            view = into.cast("B")
            view[len(view) // 2] ^= 0x10

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        await self._meet("list")
        async for info in self._inner.list(prefix):
            yield info

    async def delete(self, key: str) -> None:
        await self._meet("delete")
        await self._inner.delete(key)

    async def close(self) -> None:
        await self._inner.close()

    async def _meet(self, name: str) -> None:
        self._faults.count(name)
        delay = self._faults.pick_delay()
        if delay:
            await asyncio.sleep(delay)
        if self._faults.out or self._faults.throw(self._faults.unavailable):
            raise StoreUnavailableError(f"{self.url} does not answer, on purpose")
        if self._faults.throw(self._faults.busy):
            raise StoreBusyError(f"{self.url} is busy, on purpose")


def objects_of_chunk(name: str, key: bytes) -> list[str]:
    """Object keys of all tiles of a chunk in the `MemoryStore` of that name, in order."""

    async def find() -> list[str]:
        return sorted([info.key async for info in MemoryStore(name).list() if key.hex() in info.key])

    return asyncio.run(find())


def damage_object(name: str, object_key: str) -> None:
    """Flip a bit in the last byte, which is KV."""

    async def damage() -> None:
        store = MemoryStore(name)
        info = await store.head(object_key)
        assert info is not None
        data = bytearray(info.size)
        await store.get_range(object_key, 0, memoryview(data))
        data[-1] ^= 1
        await store.put(object_key, data, metadata=info.metadata, replace=True)

    asyncio.run(damage())
