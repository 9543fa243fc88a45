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
_PREFIX = re.compile(r"([a-z0-9][a-z0-9._-]*/)*([a-z0-9][a-z0-9._-]*)?", re.ASCII)
_METADATA_NAME = re.compile(r"[a-z0-9][a-z0-9-]*", re.ASCII)
_METADATA_VALUE = re.compile(r"[!-~]+( [!-~]+)*", re.ASCII)


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

    async def probe(self) -> None:
        """Find out early, with one cheap request, that the store can be used as it was configured.

        Raises `StoreUnavailableError` (endpoint, network) or `StoreRefusedError` (credentials, permission, bucket, a
        path that is no directory), with a message that says what to do. Creates nothing.
        """

    async def put(
        self, key: str, data: Buffer, *, metadata: Mapping[str, str] | None = None, replace: bool = False
    ) -> bool:
        """Write an object atomically. True: created; False: one was already there and was left alone.

        With `replace`, an existing object is replaced and the answer is True. `data` must not change until the call
        returns. `metadata` is a hint (see `check_metadata`); a store that cannot keep it, such as a file system without
        extended attributes, drops it. After a lost acknowledgement and a retry, False may mean that this very call
        created the object.
        """

    async def head(self, key: str) -> ObjectInfo | None:
        """Size and metadata, or None where there is no such object.

        Raises `DamagedObjectError` where something that cannot be read as an object lies under the name.
        """

    async def get_range(self, key: str, start: int, into: memoryview) -> None:
        """Fill `into` (writable, contiguous) with the bytes from `start` on.

        Raises `ObjectNotFoundError` where there is no such object, and `DamagedObjectError` (TRUNCATED) where it ends
        before `start + len(into)` or the server's answer is not that range; `into` is then undefined.
        """

    def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """All objects whose key starts with `prefix`, in no particular order, without metadata.

        Foreign objects, whose names `check_key` would refuse, are left out.
        """

    async def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""

    async def close(self) -> None:
        """Release connections and threads. Safe to call twice."""


def check_key(key: str) -> str:
    """Return `key` if it is strict: lower-case letters, digits, `._-` and `/` between non-empty parts, at most 512.

    No part starts with a dot, so no key can name a temporary file, a hidden file or a parent directory.
    """
    if not is_key(key):
        raise InvalidArgumentError(
            f"{key[:80]!r} is not an object key: use lower-case letters, digits, '.', '_', '-' and '/'"
        )
    return key


def is_key(name: str) -> bool:
    """Whether `check_key` would accept `name`."""
    return len(name) <= 512 and _KEY.fullmatch(name) is not None


def check_prefix(prefix: str) -> str:
    """Return `prefix` if a key could start with it; "" stands for all keys."""
    if len(prefix) > 512 or _PREFIX.fullmatch(prefix) is None:
        raise InvalidArgumentError(f"{prefix[:80]!r} is not the beginning of an object key")
    return prefix


def check_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return a copy of `metadata` if it survives a journey through HTTP headers unchanged.

    Names are lower-case letters, digits and '-'; values are printable ASCII, not empty, with single spaces inside.
    """
    copy = dict(metadata or {})
    for name, value in copy.items():
        if _METADATA_NAME.fullmatch(name) is None:
            raise InvalidArgumentError(f"metadata name {name[:80]!r}: use lower-case letters, digits and '-'")
        if _METADATA_VALUE.fullmatch(value) is None:
            raise InvalidArgumentError(f"metadata value of {name!r}: use printable ASCII without spaces at the ends")
    size = sum(len(name) + len(value) for name, value in copy.items())
    if size > MAX_METADATA_BYTES:
        raise InvalidArgumentError(f"metadata has {size} bytes; at most {MAX_METADATA_BYTES} are kept by every store")
    return copy


def view_source(data: Buffer) -> memoryview:
    """Return a flat view of the bytes to write, without copying."""
    view = memoryview(data)
    if not view.c_contiguous:
        raise InvalidArgumentError("data to store must be contiguous")
    return view.cast("B")


def view_target(start: int, into: memoryview) -> memoryview:
    """Return a flat view of the buffer to fill, if a range that begins at `start` can be read into it."""
    if start < 0:
        raise InvalidArgumentError(f"a range cannot start at {start}")
    if into.readonly or not into.c_contiguous:
        raise InvalidArgumentError("the buffer to read into must be writable and contiguous")
    return into.cast("B")
