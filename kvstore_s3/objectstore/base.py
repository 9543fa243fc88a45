"""The protocol of an object store. Every implementation passes `tests/objectstore/suite.py`."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from kvstore_s3.errors import InvalidArgumentError

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes. A `memoryview` must have format "B"."""

MAX_METADATA_BYTES = 2000
"""Names and values together, the limit that S3 servers share (2 KB less their own names)."""

_KEY = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as a listing or a head shows it. `metadata` is filled by `head` alone."""

    key: str
    size: int
    metadata: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class ObjectStore(Protocol):
    """Named, immutable byte strings. Keys are relative to the store's URL (see `check_key`).

    Errors of all verbs: `StoreUnavailableError`, `StoreRefusedError`; a bad key is an `InvalidArgumentError`.
    All verbs may be cancelled; nothing half-made stays behind, and no write into a caller's buffer happens afterwards.
    """

    @property
    def url(self) -> str:
        """The URL it was opened with, without credentials."""

    async def put(
        self, key: str, data: Buffer, *, metadata: Mapping[str, str] | None = None, replace: bool = False
    ) -> bool:
        """Write an object atomically. True: created; False: one was already there and was left alone.

        With `replace`, an existing object is replaced and the answer is True. `data` must not change until the call
        returns. `metadata` is a hint of lower-case ASCII names and values, `MAX_METADATA_BYTES` in all; a store that
        cannot keep it (a file system without extended attributes) drops it.
        """

    async def head(self, key: str) -> ObjectInfo | None:
        """Size and metadata, or None where there is no such object."""

    async def get_range(self, key: str, start: int, into: memoryview) -> None:
        """Fill `into` (writable, contiguous) with the bytes from `start` on.

        Raises `ObjectNotFoundError` where there is no such object, and `DamagedObjectError` (TRUNCATED) where it ends
        before `start + len(into)` or the server's answer is not that range; `into` is then undefined.
        """

    def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """All objects whose key starts with `prefix`, in no particular order, without metadata."""

    async def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""

    async def close(self) -> None:
        """Release connections and threads. Safe to call twice."""


def check_key(key: str) -> str:
    """Return `key` if it is strict: lower-case letters, digits, `._-` and `/` between non-empty parts, at most 512.

    No part starts with a dot, so no key can name a temporary file, a hidden file or a parent directory.
    """
    if len(key) > 512 or _KEY.fullmatch(key) is None:
        raise InvalidArgumentError(f"{key[:80]!r} is not an object key: use lower-case letters, digits, '.', '_', '-' and '/'")
    return key
