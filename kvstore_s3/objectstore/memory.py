"""memory://: objects in a dictionary. The public fake: for tests, and for trying things out.

`memory://NAME` is one store for all who open that name in this process, and lives as long as the process does.
A bare `memory://` is private to whoever opened it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

from kvstore_s3.errors import BitstreamFault, DamagedObjectError, ObjectNotFoundError, StoreUnavailableError
from kvstore_s3.objectstore.base import (
    Buffer,
    ObjectInfo,
    check_key,
    check_metadata,
    check_prefix,
    view_source,
    view_target,
)


class _Object(NamedTuple):
    data: bytes
    metadata: dict[str, str]


_SHARED: dict[str, dict[str, _Object]] = {}


class MemoryStore:
    """An `ObjectStore` in memory. Single dictionary operations are atomic, so threads may share a name."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._objects: dict[str, _Object] = _SHARED.setdefault(name, {}) if name else {}
        self._closed = False

    @property
    def url(self) -> str:
        return f"memory://{self._name}"

    async def probe(self) -> None:
        self._check_open()

    async def put(
        self, key: str, data: Buffer, *, metadata: Mapping[str, str] | None = None, replace: bool = False
    ) -> bool:
        check_key(key)
        self._check_open()
        created = _Object(bytes(view_source(data)), check_metadata(metadata))
        if replace:
            self._objects[key] = created
            return True
        return self._objects.setdefault(key, created) is created

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        self._check_open()
        found = self._objects.get(key)
        return None if found is None else ObjectInfo(key, len(found.data), dict(found.metadata))

    async def get_range(self, key: str, start: int, into: memoryview) -> None:
        check_key(key)
        target = view_target(start, into)
        self._check_open()
        found = self._objects.get(key)
        if found is None:
            raise ObjectNotFoundError(f"{self.url}: there is no object {key}")
        end = start + len(target)
        if end > len(found.data):
            raise DamagedObjectError(
                BitstreamFault.TRUNCATED, f"{self.url}: {key} ends at byte {len(found.data)}, {end} were expected"
            )
        target[:] = memoryview(found.data)[start:end]

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)
        self._check_open()
        for key, found in list(self._objects.items()):
            if key.startswith(prefix):
                yield ObjectInfo(key, len(found.data))

    async def delete(self, key: str) -> None:
        check_key(key)
        self._check_open()
        self._objects.pop(key, None)

    async def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailableError(f"{self.url} is closed; open it again")
