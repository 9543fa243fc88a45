"""Which pieces are being offered, and which have to go."""

from __future__ import annotations

from kvstore_s3.tier.extents import Extent
from kvstore_s3.tier.open_pieces import OpenPiece, OpenPieces


def opened(pieces: OpenPieces, number: int, now: float = 0.0) -> OpenPiece:
    piece = pieces.find("key", Extent("a", 10 * number, 10 * number + 10), now)
    assert piece is not None
    return piece


def test_a_piece_is_found_again_and_another_range_at_its_start_is_refused() -> None:
    pieces = OpenPieces(2)
    assert opened(pieces, 0) is opened(pieces, 0)
    assert pieces.find("key", Extent("a", 0, 5), 0.0) is None


def test_pieces_beyond_the_limit_are_ignored_until_they_end() -> None:
    pieces = OpenPieces(2)
    found = [opened(pieces, number) for number in range(3)]
    assert [piece.ignored for piece in found] == [False, False, True]
    assert len(pieces) == 2
    assert opened(pieces, 2) is found[2]
    assert pieces.remove(found[2])
    assert opened(pieces, 2) is not found[2]


def test_idle_pieces_go_and_touched_ones_stay() -> None:
    pieces = OpenPieces(9)
    first, second = opened(pieces, 0, 0.0), opened(pieces, 1, 0.0)
    opened(pieces, 0, 30.0)
    assert pieces.pop_idle(59.0) == []
    assert pieces.pop_idle(60.0) == [second]
    assert pieces.pop_idle(90.0) == [first]


def test_a_piece_does_not_take_out_the_one_that_came_after_it() -> None:
    pieces = OpenPieces(2)
    old = opened(pieces, 0)
    assert pieces.pop("a", 0) is old
    new = opened(pieces, 0)
    assert not pieces.remove(old)
    pieces.ignore(old)
    assert opened(pieces, 0) is new
    assert not new.ignored


def test_the_pieces_of_one_object_are_taken_out_together() -> None:
    pieces = OpenPieces(1)
    taken = {id(opened(pieces, number)) for number in range(3)}
    pieces.find("key", Extent("b", 0, 10), 0.0)
    assert {id(piece) for piece in pieces.pop_all("a")} == taken
    assert [piece.extent.name for piece in pieces.pop_all()] == ["b"]
