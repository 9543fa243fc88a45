"""Which chunks of a prompt are stored: by the verdicts of earlier lookups, the tiers on this machine, and the store.

The store is asked by parallel heads. A chunk is there when its objects cover the rectangle that this process holds:
mostly one object of just that rectangle, else those of other partitions of the model, which their markers tell.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from kvstore_s3.bitstream import Identity
from kvstore_s3.covers import cut_cover, holds_corner, meet
from kvstore_s3.errors import BitstreamFault, DamagedObjectError
from kvstore_s3.inspection import Absence, Inspector, needs_header, object_key
from kvstore_s3.layout import Shard
from kvstore_s3.load import LOST, MissingCalibrationError, StoredChunk, run_all
from kvstore_s3.metrics import Count, ignore
from kvstore_s3.shards import KnownShards
from kvstore_s3.verdicts import Verdict, Verdicts

log = logging.getLogger("kvstore_s3")

_MOST_SET_ASIDE = 4096
"""Objects of other shards of which it is remembered that they were said to be unusable."""

Answers = dict[Shard, StoredChunk | Absence]
"""What is known of a chunk's objects."""

_OF_ANOTHER_VERSION = (BitstreamFault.UNSUPPORTED_VERSION, BitstreamFault.UNSUPPORTED_FEATURE)


class ChunkFinder:
    """Finds chunks in one object store and the tiers in front of it.

    A chunk that was found is not asked for again for `verdict_lifetime_s`; its verdict is withdrawn as soon as it turns
    out damaged or gone. A chunk that was lost is not offered again for so long, unless `mend` is told of it sooner. An
    object of a profile that the inspector's quality does not accept counts as lost too where it is of the reader's own
    rectangle: a save replaces it.
    """

    def __init__(
        self,
        inspector: Inspector,
        shards: KnownShards,
        *,
        concurrency: int,
        verdict_lifetime_s: float,
        miss_lifetime_s: float = 0.0,
        count: Count = ignore,
    ) -> None:
        self._inspector = inspector
        self._shards = shards
        self._concurrency = concurrency
        self._count = count
        self._set_aside: dict[str, None] = {}
        self._verdicts = Verdicts(lifetime_s=verdict_lifetime_s, miss_lifetime_s=miss_lifetime_s)
        self._usual: tuple[Shard, ...] = ()
        """The objects that made up the chunk found last, where it was not one of the reader's own rectangle."""
        self._mended = 0

    async def find_all(
        self,
        identities: Sequence[Identity],
        *,
        stop_at_miss: bool,
        thorough: bool,
        first_token: int = 0,
        fresh: bool = False,
    ) -> list[StoredChunk | None]:
        """One answer for each chunk, in order, the first at position `first_token` of its prompt.

        `identities` are those of objects of the reader's own rectangle. With `stop_at_miss`, chunks behind the first
        miss may be None. `thorough` reads the header of each scalable object, which alone names its calibration: one
        whose calibration is not at hand is a miss here, and not only when it is loaded. `fresh` asks the store alone,
        whatever is remembered: for writers.
        """
        found: list[StoredChunk | None] = [None] * len(identities)
        limit = len(identities)
        unknown: list[int] = []
        for index, identity in enumerate(identities):
            verdict = None if fresh else self._recall(identity, thorough)
            if verdict is None:
                unknown.append(index)
            elif verdict.chunk is not None:
                found[index] = verdict.chunk.moved(first_token + index * identity.tokens)
            elif stop_at_miss:
                limit = index
                break
        if unknown:
            self._shards.refresh_soon()
        pending = iter(unknown)

        async def work() -> None:
            nonlocal limit
            for index in pending:
                if index >= limit:
                    return
                position = first_token + index * identities[index].tokens
                found[index] = await self._find(identities[index], position, thorough, fresh)
                if found[index] is None and stop_at_miss:
                    limit = min(limit, index)

        await run_all([work() for _ in range(min(self._concurrency, len(unknown)))])
        return found

    def _recall(self, identity: Identity, thorough: bool) -> Verdict | None:
        """What is known of the chunk, if that is enough for this lookup."""
        verdict = self._verdicts.find(identity.key)
        if verdict is None or verdict.chunk is None or not thorough:
            return verdict
        tiles = verdict.chunk.tiles
        return None if any(tile.header is None and needs_header(tile.table.profile) for tile in tiles) else verdict

    async def _find(self, identity: Identity, first_token: int, thorough: bool, fresh: bool) -> StoredChunk | None:
        if self.is_lost(identity):
            return None
        mended = self._mended
        try:
            chunk = await self._find_cover(_Question(identity, first_token, thorough, fresh))
        except LOST as error:
            self.lose(identity, error)
            return None
        if not self.is_lost(identity) and (chunk is not None or mended == self._mended):
            self._verdicts.note(identity.key, chunk)  # not a miss that a save may have mended meanwhile
        return chunk

    async def _find_cover(self, question: _Question) -> StoredChunk | None:
        """Ask for the object of the reader's own rectangle and those that are usual, then for all that may help."""
        own = question.identity.shard
        answers: Answers = {}
        await self._ask(question, {own, *self._usual}, answers)
        chunk = self._join(own, answers)
        if chunk is not None:
            return chunk
        known = await self._shards.find(must_know=not question.fresh)  # a writer at worst writes what is there in parts
        others = [shard for shard in known if shard not in answers and meet(shard, own)]
        corner = {shard for shard in others if holds_corner(shard, own)}
        for shards in (corner, set(others) - corner):
            if shards and cut_cover(own, [*_usable(answers), *others]) is not None:
                await self._ask(question, shards, answers)
                others = [shard for shard in others if shard not in answers]
        chunk = self._join(own, answers)
        if chunk is None and answers[own] is Absence.UNUSABLE:
            self._verdicts.lose(question.identity.key)
        return chunk

    async def _ask(self, question: _Question, shards: Collection[Shard], answers: Answers) -> None:
        """Look for the chunk's objects of `shards`, all at once."""

        async def ask(shard: Shard) -> None:
            answers[shard] = await self._find_tile(question, shard)

        if len(shards) == 1:
            await ask(*shards)
        else:
            await run_all([ask(shard) for shard in shards])

    async def _find_tile(self, question: _Question, shard: Shard) -> StoredChunk | Absence:
        """One object of the chunk. Raises one of `LOST` where that of the reader's own rectangle cannot be read."""
        identity, first_token, thorough = question.identity, question.first_token, question.thorough
        mine = shard == identity.shard
        if not mine:
            identity = replace(identity, shard=shard)
        tile = None if question.fresh else await self._inspector.find_local(identity, first_token, thorough=thorough)
        if tile is not None:
            return tile
        try:
            return await self._inspector.find_stored(identity, first_token, thorough=thorough)
        except LOST as error:
            if mine:
                raise
            key = object_key(identity)
            if key not in self._set_aside:
                self._set_aside[key] = None
                log.warning("%s is left aside: %s", key, error)
                self._count("chunks_lost", 1)
                if len(self._set_aside) > _MOST_SET_ASIDE:
                    del self._set_aside[next(iter(self._set_aside))]
            return Absence.UNUSABLE

    def _join(self, own: Shard, answers: Answers) -> StoredChunk | None:
        """One chunk of the objects that were found, if they cover the reader's rectangle."""
        found = _usable(answers)
        if own in found:
            self._usual = ()
            return found[own]
        shards = list(found)
        pieces = cut_cover(own, shards)
        if pieces is None:
            return None
        tiles = [found[shards[number]] for number in sorted({number for number, _ in pieces})]
        self._usual = tuple(tile.identity.shard for tile in tiles)
        return StoredChunk.join(tiles)

    def lose(self, identity: Identity, error: Exception, begun: float = float("inf")) -> None:
        """Withdraw the verdict on a chunk, so that it is not offered again at once, and the next save mends it.

        `identity` is that of the object that failed. Unless a save has mended it already, since the work that failed
        has `begun`.
        """
        if self._verdicts.is_written_since(identity.key, begun):
            return
        if not self.is_lost(identity) and not isinstance(error, MissingCalibrationError):
            log.warning("%s is treated as a miss: %s", object_key(identity), error)
        self._count("chunks_lost", 1)
        self._verdicts.lose(identity.key, identity if _is_broken(error) else None)

    def is_lost(self, identity: Identity) -> bool:
        return self._verdicts.is_lost(identity.key)

    def find_broken(self, identity: Identity) -> Identity | None:
        """The object whose damage lost the chunk, where it is of another rectangle than `identity`."""
        broken = self._verdicts.find_broken(identity.key)
        return broken if broken is not None and broken.shard != identity.shard else None

    def mend(self, identity: Identity) -> None:
        """The object was written anew."""
        self._mended += 1
        self._verdicts.forget(identity.key)


@dataclass(frozen=True, slots=True)
class _Question:
    """`identity` is that of the object of the reader's own rectangle."""

    identity: Identity
    first_token: int
    thorough: bool
    fresh: bool


def _usable(answers: Answers) -> dict[Shard, StoredChunk]:
    return {shard: answer for shard, answer in answers.items() if isinstance(answer, StoredChunk)}


def _is_broken(error: Exception) -> bool:
    """Whether an object is of no use to anybody, rather than gone or of a kind that this version cannot read."""
    if isinstance(error, MissingCalibrationError) or not isinstance(error, DamagedObjectError):
        return False
    return error.code not in _OF_ANOTHER_VERSION
