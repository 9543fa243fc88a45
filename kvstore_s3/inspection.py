"""One object of a chunk: whether it is there, where its sections lie, and whether this reader can use it.

The hint in the object's metadata tells, or the header, which the tiers on this machine may have.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import TYPE_CHECKING

from kvstore_s3.bitstream import HINT_NAME, Header, Identity, decode_hint, parse_header, read_header_length
from kvstore_s3.errors import DamagedObjectError
from kvstore_s3.load import StoredChunk
from kvstore_s3.objectstore.base import ObjectInfo, ObjectStore
from kvstore_s3.quality import Quality
from kvstore_s3.section_index import PROFILES
from kvstore_s3.transfer.ranges import count_levels

if TYPE_CHECKING:
    from kvstore_s3.codec.calibration import Calibration

log = logging.getLogger("kvstore_s3")

_HEADER_GUESS = 4096
"""Bytes read for a header whose length is not known: enough for 100 sections."""

ReadLocal = Callable[[str, int], Awaitable[bytes | None]]
"""The first bytes of an object, so many or all it has, from the tiers on this machine; None: they do not have them."""


async def read_nothing(object_key: str, length: int) -> bytes | None:
    """The `ReadLocal` of a machine without tiers."""
    return None


def object_key(identity: Identity) -> str:
    """`<namespace>/<chunk key>/<shard>`, as docs/FORMAT.md says."""
    return f"{identity.namespace.hex()}/{identity.key.hex()}/{identity.shard.name}"


class Absence(Enum):
    """Why there is no object for a reader: none lies under the name, or one that is not of a quality it accepts."""

    MISSING = "missing"
    UNUSABLE = "unusable"


class Inspector:
    """Looks at objects of one store and of the tiers in front of it, for a reader of `quality`."""

    def __init__(
        self,
        objects: ObjectStore,
        quality: Quality,
        *,
        find_calibration: Callable[[bytes], Awaitable[Calibration | None]],
        read_local: ReadLocal = read_nothing,
        on_delay: Callable[[float, float], None] = lambda seconds, now: None,
    ) -> None:
        self._objects = objects
        self._quality = quality
        self._find_calibration = find_calibration
        self._read_local = read_local
        self._on_delay = on_delay
        self._told: set[int] = set()

    async def find_stored(self, identity: Identity, first_token: int, *, thorough: bool) -> StoredChunk | Absence:
        """The object as the store has it. Raises `DamagedObjectError` or `ObjectNotFoundError` as reading does."""
        begun = time.monotonic()
        info = await self._objects.head(object_key(identity))
        now = time.monotonic()
        self._on_delay(now - begun, now)
        return Absence.MISSING if info is None else await self._inspect(info, identity, first_token, thorough)

    async def find_local(self, identity: Identity, first_token: int, *, thorough: bool) -> StoredChunk | None:
        """The object as the tiers have it; None where they have not, or not so that it can be used."""
        key = object_key(identity)
        data = await self._read_local(key, _HEADER_GUESS)
        if data is None:
            return None
        try:
            length = read_header_length(data)
            if length > len(data):
                data = await self._read_local(key, length) or b""
            header = parse_header(data, identity, profiles=PROFILES, calibrations=None)
        except DamagedObjectError:
            return None  # the store has it whole
        if not self._quality.is_met_by(header.table.profile, count_levels(header.table)):
            return None
        if thorough and not await self._is_decodable(header):
            return None
        return StoredChunk(key, identity, header.table, header, first_token)

    async def _inspect(
        self, info: ObjectInfo, identity: Identity, first_token: int, thorough: bool
    ) -> StoredChunk | Absence:
        hint = info.metadata.get(HINT_NAME)
        if hint is not None:
            try:
                table = decode_hint(hint, identity, profiles=self._quality.accepts)
            except DamagedObjectError:
                pass  # a hint is only a hint: the header decides
            else:
                enough = not thorough or not needs_header(table.profile)
                fits = table.object_length == info.size
                if enough and fits and self._quality.is_met_by(table.profile, count_levels(table)):
                    return StoredChunk(info.key, identity, table, None, first_token)
        data = bytearray(min(_HEADER_GUESS, info.size))
        await self._objects.get_range(info.key, 0, memoryview(data))
        length = read_header_length(data)
        if length > len(data):
            data = bytearray(min(length, info.size))
            await self._objects.get_range(info.key, 0, memoryview(data))
        header = parse_header(data, identity, profiles=PROFILES, calibrations=None)
        header.table.check_object_length(info.size)
        if not self._is_accepted(header) or (thorough and not await self._is_decodable(header)):
            return Absence.UNUSABLE
        return StoredChunk(info.key, identity, header.table, header, first_token)

    async def _is_decodable(self, header: Header) -> bool:
        return header.calibration is None or await self._find_calibration(header.calibration) is not None

    def _is_accepted(self, header: Header) -> bool:
        """Whether the object is as good as the quality wanted; that one is not is said once for each profile."""
        profile = header.table.profile
        if self._quality.is_met_by(profile, count_levels(header.table)):
            return True
        if profile not in self._told:
            self._told.add(profile)
            name = next(name for name, number in PROFILES.items() if number == profile)
            log.info(
                "there are %s objects in the store that profile %r cannot use: they are misses, and saves replace them",
                name,
                self._quality.name,
            )
        return False


def needs_header(profile: int) -> bool:
    """Whether objects of this profile say something in their header alone: which calibration they were coded with."""
    return profile == PROFILES["scalable"]
