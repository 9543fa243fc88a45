"""The index of extents, beside a set of single bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.tier.extents import Extent, Extents

RANGES = st.tuples(st.integers(0, 30), st.integers(1, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def made(*ranges: tuple[int, int], name: str = "a") -> Extents:
    extents = Extents()
    for start, end in ranges:
        extents.add(Extent(name, start, end))
    return extents


@given(st.lists(RANGES, max_size=8), RANGES)
def test_a_range_is_covered_where_each_of_its_bytes_is_kept(
    kept: list[tuple[int, int]], asked: tuple[int, int]
) -> None:
    present = {byte for start, end in kept for byte in range(start, end)}
    assert made(*kept).covers("a", *asked) == (set(range(*asked)) <= present)


@given(st.lists(RANGES, max_size=8), RANGES)
def test_the_parts_of_a_covered_range_are_the_range_without_gap_or_overlap(
    kept: list[tuple[int, int]], asked: tuple[int, int]
) -> None:
    parts = made(*kept).parts("a", *asked)
    assert all(extent.start <= start < end <= extent.end for extent, start, end in parts)
    bytes_read = [byte for _, start, end in parts for byte in range(start, end)]
    assert not parts or bytes_read == list(range(*asked))


def test_other_objects_and_empty_ranges_are_not_covered() -> None:
    extents = made((0, 10))
    assert not extents.covers("b", 0, 10)
    assert not extents.covers("a", 5, 5)
    assert not Extents().covers("a", 0, 1)


def test_a_discarded_extent_covers_nothing_and_discarding_twice_is_harmless() -> None:
    extents = made((0, 10), (10, 20))
    for _ in range(2):
        extents.discard(Extent("a", 0, 10))
        assert (len(extents), list(extents)) == (1, [Extent("a", 10, 20)])
    assert not extents.covers("a", 9, 11)


def test_one_extent_holds_a_range_only_in_full() -> None:
    extents = made((0, 10), (10, 20))
    assert extents.holding("a", 2, 10) == Extent("a", 0, 10)
    assert extents.holding("a", 9, 11) is None


def test_extents_within_a_larger_one_are_superfluous() -> None:
    extents = made((0, 10), (5, 15), (10, 20), (8, 21))
    assert set(extents.within(Extent("a", 0, 20))) == {Extent("a", 0, 10), Extent("a", 5, 15), Extent("a", 10, 20)}
