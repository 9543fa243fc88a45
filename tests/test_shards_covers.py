"""Rectangles made up of other rectangles."""

from __future__ import annotations

from collections import Counter

from hypothesis import example, given
from hypothesis import strategies as st

from kvstore_s3.covers import cut_cover, holds_corner, meet
from kvstore_s3.layout import Shard


@st.composite
def shards(draw: st.DrawFn) -> Shard:
    layers = sorted(draw(st.lists(st.integers(0, 6), min_size=2, max_size=2, unique=True)))
    heads = sorted(draw(st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True)))
    return Shard(*layers, *heads)


def places(shard: Shard) -> set[tuple[int, int]]:
    return {
        (layer, head)
        for layer in range(shard.layer_begin, shard.layer_end)
        for head in range(shard.head_begin, shard.head_end)
    }


@given(shards(), st.lists(shards(), max_size=8))
@example(Shard(0, 4, 0, 4), [Shard(0, 3, 0, 4), Shard(2, 4, 0, 4)])
@example(Shard(0, 4, 0, 4), [Shard(0, 4, 0, 2), Shard(0, 2, 2, 4), Shard(2, 4, 2, 4)])
def test_a_cover_is_found_exactly_where_there_is_one_and_takes_each_place_once(
    wanted: Shard, tiles: list[Shard]
) -> None:
    pieces = cut_cover(wanted, tiles)
    covered = places(wanted) <= set().union(*map(places, tiles))
    assert (pieces is not None) == covered
    if pieces is not None:
        assert all(places(piece) <= places(tiles[number]) for number, piece in pieces)
        assert Counter(place for _, piece in pieces for place in places(piece)) == Counter(places(wanted))


@given(shards(), shards())
def test_what_two_rectangles_share_is_a_rectangle(one: Shard, other: Shard) -> None:
    shared = meet(one, other)
    assert (places(shared) if shared else set()) == places(one) & places(other)
    assert holds_corner(one, other) == ((other.layer_begin, other.head_begin) in places(one))


def test_of_equal_tiles_the_first_is_taken_and_of_others_the_larger() -> None:
    whole, half = Shard(0, 4, 0, 4), Shard(0, 4, 0, 2)
    assert cut_cover(whole, [half, whole, whole]) == [(1, whole)]
    assert cut_cover(half, [whole, half]) == [(0, half)]
