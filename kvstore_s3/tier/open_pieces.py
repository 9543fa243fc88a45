"""Pieces that are being offered: a bounded number of them. Pure, but for the lock that each carries.

A piece that is not to be written (no room, a failure) is followed to its end all the same, so that its later offers are
not taken for the first of a piece that can never become whole.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field

from kvstore_s3.tier.extents import Extent
from kvstore_s3.tier.nvme_records import Temporary
from kvstore_s3.tier.pieces import Piece, file_size

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
    closed: bool = False  # whole or abandoned: whoever still waits for the lock has nothing to add
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

    @property
    def bytes(self) -> int:
        """What the files of the pieces that are written take up, or will soon."""
        return sum(file_size(piece.extent) for piece in self._written.values())

    def find(self, key: str, extent: Extent, now: float) -> OpenPiece | None:
        """The piece to offer to; None where another range begins there."""
        name = (extent.name, extent.start)
        found = self._written.get(name) or self._ignored.get(name)
        if found is None:
            found = OpenPiece(key, Piece(extent), now)
            self._written[name] = found
            if len(self._written) > self._most:
                self.ignore(found)
        found.touched = now
        if name in self._written:
            self._written.move_to_end(name)
        return found if found.extent == extent else None

    def ignore(self, piece: OpenPiece) -> None:
        """From now on only its bytes are counted."""
        piece.ignored = True
        if self.remove(piece):
            self._ignored[piece.extent.name, piece.extent.start] = piece
        while len(self._ignored) > _MOST_IGNORED:
            self._ignored.popitem(last=False)

    def remove(self, piece: OpenPiece) -> bool:
        """Take out this very piece; False where it was taken out before, even if a new one is in its place."""
        name = (piece.extent.name, piece.extent.start)
        for pieces in (self._written, self._ignored):
            if pieces.get(name) is piece:
                del pieces[name]
                return True
        return False

    def pop(self, name: str, start: int) -> OpenPiece | None:
        return self._written.pop((name, start), None) or self._ignored.pop((name, start), None)

    def pop_all(self, name: str | None = None) -> list[OpenPiece]:
        """Take out the pieces of one object, or all."""
        chosen = [each for each in (*self._written, *self._ignored) if name is None or each[0] == name]
        return [piece for each in chosen if (piece := self.pop(*each)) is not None]

    def pop_idle(self, now: float) -> list[OpenPiece]:
        """Take out the pieces that nobody offered to for a minute: their loads ended without a word."""
        idle = []
        while self._written and now - next(iter(self._written.values())).touched >= _IDLE_S:
            idle.append(self._written.popitem(last=False)[1])
        return idle
