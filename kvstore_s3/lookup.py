"""Which chunks of a prompt are stored: parallel heads, hints and headers, and verdicts that are withdrawn."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from kvstore_s3.bitstream import HINT_NAME, Header, Identity, decode_hint, parse_header, read_header_length
from kvstore_s3.errors import DamagedObjectError
from kvstore_s3.load import LOST, MissingCalibrationError, StoredChunk, run_all
from kvstore_s3.objectstore.base import ObjectInfo, ObjectStore
from kvstore_s3.quality import Quality
from kvstore_s3.section_index import PROFILES
from kvstore_s3.transfer.ranges import count_levels

if TYPE_CHECKING:
    from kvstore_s3.codec.calibration import Calibration

log = logging.getLogger("kvstore_s3")

_HEADER_GUESS = 4096
"""Bytes read for a header whose length is not known: enough for 100 sections."""


def object_key(identity: Identity) -> str:
    """`<namespace>/<chunk key>/<shard>`, as docs/FORMAT.md says."""
    return f"{identity.namespace.hex()}/{identity.key.hex()}/{identity.shard.name}"


class ChunkFinder:
    """Finds chunks in one object store, and remembers which turned out damaged, gone, or of no use to `quality`.

    A chunk that was lost is not offered again for `verdict_lifetime_s` seconds, unless `mend` is told of it sooner. An
    object of a profile that `quality` does not accept counts as lost too: a save replaces it.
    """

    def __init__(
        self,
        objects: ObjectStore,
        quality: Quality,
        *,
        find_calibration: Callable[[bytes], Awaitable[Calibration | None]],
        concurrency: int,
        verdict_lifetime_s: float,
    ) -> None:
        self._objects = objects
        self._quality = quality
        self._find_calibration = find_calibration
        self._concurrency = concurrency
        self._verdict_lifetime_s = verdict_lifetime_s
        self._lost: dict[bytes, float] = {}
        self._told: set[int] = set()

    async def find_all(
        self, identities: Sequence[Identity], *, stop_at_miss: bool, thorough: bool, first_token: int = 0
    ) -> list[StoredChunk | None]:
        """One answer for each chunk, in order, the first at position `first_token` of its prompt.

        With `stop_at_miss`, those behind the first miss may be None. `thorough` reads the header of each scalable
        object, which alone names its calibration: one whose calibration is not at hand is a miss here, and not only
        when it is loaded.
        """
        found: list[StoredChunk | None] = [None] * len(identities)
        limit = len(identities)
        position = 0

        async def work() -> None:
            nonlocal limit, position
            while position < limit:
                index, position = position, position + 1
                position_in_prompt = first_token + index * identities[index].tokens
                found[index] = await self._find(identities[index], position_in_prompt, thorough)
                if found[index] is None and stop_at_miss:
                    limit = min(limit, index)

        await run_all([work() for _ in range(min(self._concurrency, len(identities)))])
        return found

    async def _find(self, identity: Identity, first_token: int, thorough: bool) -> StoredChunk | None:
        if self.is_lost(identity):
            return None
        try:
            info = await self._objects.head(object_key(identity))
            return None if info is None else await self._inspect(info, identity, first_token, thorough)
        except LOST as error:
            self.lose(identity, error)
            return None

    async def _inspect(
        self, info: ObjectInfo, identity: Identity, first_token: int, thorough: bool
    ) -> StoredChunk | None:
        hint = info.metadata.get(HINT_NAME)
        if hint is not None:
            try:
                table = decode_hint(hint, identity, profiles=self._quality.accepts)
            except DamagedObjectError:
                pass  # a hint is only a hint: the header decides
            else:
                enough = not thorough or table.profile != PROFILES["scalable"]
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
            self._withdraw(identity)
            return None
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

    def lose(self, identity: Identity, error: Exception) -> None:
        """Withdraw the verdict on an object, so that it is not offered again at once, and the next save mends it."""
        if not self.is_lost(identity) and not isinstance(error, MissingCalibrationError):
            log.warning("%s is treated as a miss: %s", object_key(identity), error)
        self._withdraw(identity)

    def _withdraw(self, identity: Identity) -> None:
        now = time.monotonic()
        self._lost = {key: until for key, until in self._lost.items() if until > now}
        self._lost[identity.key] = now + self._verdict_lifetime_s

    def is_lost(self, identity: Identity) -> bool:
        return self._lost.get(identity.key, 0.0) > time.monotonic()

    def mend(self, identity: Identity) -> None:
        """The object was written anew."""
        self._lost.pop(identity.key, None)
