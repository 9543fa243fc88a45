"""Pieces that are being offered: a bounded number of them. Pure, but for the lock that each carries.

A piece that is not to be written (no room, a failure) is followed to its end all the same, so that its later offers are
not taken for the first of a piece that can never become whole.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field

from kvstore_s3.tier.extents import Extent
from kvstore_s3.tier.nvme_files import Temporary
from kvstore_s3.tier.pieces import Piece

_MOST_IGNORED = 4096
_IDLE_S = 60.0


@dataclass(slots=True)
class OpenPiece:
    """One piece and its file, once it has one. Whoever works on it holds `lock`."""

    key: str
    piece: Piece
    touched: float
    temporary: Temporary | None = None
    ignored: bool = False
    abandoned: bool = False
    dropped: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def extent(self) -> Extent:
        return self.piece.extent


class OpenPieces:
    """The pieces by object and start. At most `most` of them are written at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._written: OrderedDict[tuple[str, int], OpenPiece] = OrderedDict()
        self._ignored: OrderedDict[tuple[str, int], OpenPiece] = OrderedDict()

    def __len__(self) -> int:
        return len(self._written)

    def find(self, key: str, extent: Extent, now: float) -> tuple[OpenPiece | None, OpenPiece | None]:
        """The piece to offer to (None: another range begins there), and an idle one that had to make room for it."""
        name = (extent.name, extent.start)
        found = self._written.get(name) or self._ignored.get(name)
        if found is not None:
            found.touched = now
            return (found if found.extent == extent else None), None
        made = OpenPiece(key, Piece(extent), now)
        idle = self._pop_idle(now) if len(self._written) >= self._most else None
        self._written[name] = made
        if len(self._written) > self._most:
            self.ignore(made)
        return made, idle

    def ignore(self, piece: OpenPiece) -> None:
        """From now on only its bytes are counted."""
        name = (piece.extent.name, piece.extent.start)
        piece.ignored = True
        if self._written.pop(name, None) is not None:
            self._ignored[name] = piece
        while len(self._ignored) > _MOST_IGNORED:
            self._ignored.popitem(last=False)

    def remove(self, piece: OpenPiece) -> None:
        self.pop(piece.extent.name, piece.extent.start)

    def pop(self, name: str, start: int) -> OpenPiece | None:
        return self._written.pop((name, start), None) or self._ignored.pop((name, start), None)

    def pop_all(self, name: str | None = None) -> list[OpenPiece]:
        """Take out the pieces of one object, or all."""
        chosen = [each for each in (*self._written, *self._ignored) if name is None or each[0] == name]
        return [piece for each in chosen if (piece := self.pop(*each)) is not None]

    def _pop_idle(self, now: float) -> OpenPiece | None:
        oldest = min(self._written.values(), key=lambda piece: piece.touched)
        if now - oldest.touched < _IDLE_S:
            return None
        return self.pop(oldest.extent.name, oldest.extent.start)
