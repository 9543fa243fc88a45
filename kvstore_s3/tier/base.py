"""What a tier is: a nearer copy of bytes that the object store has, which may be gone at any moment.

Objects are immutable byte strings named by strict keys (`objectstore.base.check_key`). A tier keeps extents of them:
the bytes [start, end) of one object. Whoever offers bytes has verified them, and whoever reads them verifies them
again: a tier promises nothing about its content. Offers and reads never fail for the tier's own reasons, they come to
nothing. All verbs are called from one event loop.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

PAGE = 4096
"""Bytes to which memory, file offsets and lengths are aligned: what O_DIRECT and page-locking want."""


@dataclass(frozen=True, slots=True)
class TierStats:
    """What a tier holds now. `bytes` is what its entries take up, of `budget`."""

    entries: int
    bytes: int
    budget: int


@runtime_checkable
class Tier(Protocol):
    """What all tiers share."""

    @property
    def name(self) -> str:
        """For logs and counters, such as "host"."""

    @property
    def stats(self) -> TierStats:
        """What it holds now."""

    def covers(self, key: str, start: int, end: int) -> bool:
        """Whether the bytes [start, end) are kept, as far as is known without I/O. A read may still fail."""

    def drop(self, key: str) -> None:
        """Forget an object because its bytes here are damaged; what it occupies is given back soon."""

    async def close(self) -> None:
        """Release memory, files and threads. Safe to call twice."""


@runtime_checkable
class MemoryTier(Tier, Protocol):
    """A tier whose bytes are used where they lie."""

    def borrow(self, key: str, start: int, end: int) -> AbstractContextManager[memoryview] | None:
        """The bytes [start, end), unmoved and not evicted until the context ends; not to be written to.

        None where no single extent holds all of them.
        """

    async def read(self, key: str, start: int, into: memoryview) -> bool:
        """Copy the bytes from `start` on into `into`, from one extent or several. False: not all are kept."""

    async def offer(self, key: str, start: int, data: memoryview) -> bool:
        """Copy verified bytes [start, start + len(data)) into the tier, in a thread. False: not kept.

        `data` must not change until the call returns. A cancelled offer keeps nothing.
        """


@runtime_checkable
class DiskTier(Tier, Protocol):
    """A tier whose bytes are read into memory first."""

    async def read(self, key: str, start: int, into: memoryview) -> bool:
        """Fill `into` with the bytes from `start` on. False: not there, or it failed; `into` is then undefined.

        Nothing is written into `into` after the call has ended, cancelled or not.
        """

    async def offer(self, key: str, piece_start: int, piece_end: int, start: int, data: memoryview) -> None:
        """Add verified bytes from `start` on to the piece [piece_start, piece_end), which is kept once it is whole.

        A piece comes in one offer or in several, in any order; what was offered before is left out. `data` must not
        change until the call returns. A cancelled offer abandons its piece.
        """

    def abandon(self, key: str, piece_start: int) -> None:
        """The rest of this piece will not be offered: forget what was written of it."""


class Memory(Protocol):
    """A fixed piece of memory from which blocks are taken (`arena.Arena`)."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    def allocate(self, size: int) -> memoryview | None:
        """A block of `size` bytes; None: no room for it now."""

    def free(self, block: memoryview) -> None:
        """Give a block back."""
