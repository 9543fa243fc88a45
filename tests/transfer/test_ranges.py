"""Planning of range reads: exact cover, no cut sections, in layer order, no byte of a level that nobody wants."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.bitstream import PARTS_K, PARTS_KV, PARTS_V, Section, SectionTable
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.transfer.ranges import (
    Band,
    Request,
    band_ranges,
    count_levels,
    group_levels,
    has_boundaries,
    plan_bands,
    plan_ranges,
)


def table_of(groups: list[int], length: int = 100, apart: bool = False, levels: int = 1) -> SectionTable:
    sections: list[Section] = []
    offset = 256
    for level in range(levels):
        layer = 0
        for layers in groups:
            for parts in (PARTS_K, PARTS_V) if apart else (PARTS_KV,):
                sections.append(Section(level, parts, 0, layer, layer + layers, offset, length))
                offset = sections[-1].end
            layer += layers
    return SectionTable(256, tuple(sections), 1 if levels == 1 else 2)


def test_neighbours_are_joined_up_to_the_limit() -> None:
    table = table_of([2, 2, 2, 2])
    assert plan_bands([table], 112) == [Band(0, 2), Band(2, 4), Band(4, 6), Band(6, 8)]
    assert plan_bands([table], 224) == [Band(0, 4), Band(4, 8)]
    assert plan_bands([table], 10_000) == [Band(0, 8)]


def test_the_limit_is_for_all_wanted_levels_of_a_band_together() -> None:
    table = table_of([2, 2, 2, 2], levels=3)
    assert plan_bands([table], 448, levels=1) == [Band(0, 8)]
    assert plan_bands([table], 448, levels=2) == [Band(0, 4), Band(4, 8)]
    assert plan_bands([table], 447, levels=3) == [Band(0, 2), Band(2, 4), Band(4, 6), Band(6, 8)]


def test_a_section_larger_than_the_limit_is_a_band_of_its_own() -> None:
    assert plan_bands([table_of([4, 4])], 1) == [Band(0, 4), Band(4, 8)]


def test_a_band_never_cuts_a_section_of_any_object() -> None:
    assert plan_bands([table_of([2, 2, 2]), table_of([3, 3])], 1) == [Band(0, 6)]


def test_k_and_v_apart_belong_to_one_band() -> None:
    (found,) = band_ranges(table_of([2, 2], apart=True), Band(2, 4))
    assert (list(found.sections), found.start, found.end) == ([2, 3], 480, 704)


def test_all_layers_of_the_first_levels_are_one_range_from_the_first_section_on() -> None:
    (found,) = band_ranges(table_of([2, 2], levels=3), Band(0, 4), levels=2)
    assert (list(found.sections), found.start, found.end) == ([0, 1, 2, 3], 256, 704)


def test_some_layers_are_one_range_for_each_level() -> None:
    found = band_ranges(table_of([2, 2], levels=3), Band(2, 4), levels=3)
    assert [(list(part.sections), part.start, part.length) for part in found] == [
        ([1], 368, 112),
        ([3], 592, 112),
        ([5], 816, 112),
    ]


def test_an_object_with_fewer_levels_than_wanted_gives_those_it_has() -> None:
    (found,) = band_ranges(table_of([2, 2]), Band(0, 4), levels=3)
    assert (list(found.sections), found.start, found.end) == ([0, 1], 256, 480)


def test_the_levels_of_one_place_are_decoded_together() -> None:
    table = table_of([2, 2], apart=True, levels=2)
    assert group_levels(table, range(8)) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert group_levels(table, [2, 3]) == [[2], [3]]


@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=12), min_size=1, max_size=4),
    st.lists(st.integers(1, 3), min_size=4, max_size=4),
    st.integers(1, 2000),
    st.integers(1, 3),
)
def test_bands_cover_every_section_of_every_wanted_level_once(
    all_groups: list[list[int]], all_levels: list[int], limit: int, wanted: int
) -> None:
    layers = max(sum(groups) for groups in all_groups)
    tables = [
        table_of([*groups, *([1] * (layers - sum(groups)))], levels=levels)
        for groups, levels in zip(all_groups, all_levels, strict=False)
    ]
    bands = plan_bands(tables, limit, levels=wanted)
    assert (bands[0].layer_begin, bands[-1].layer_end) == (0, layers)
    assert [band.layer_end for band in bands[:-1]] == [band.layer_begin for band in bands[1:]]
    for table in tables:
        assert all(has_boundaries(table, band) for band in bands)
        read = min(wanted, count_levels(table))
        found = [part for band in bands for part in band_ranges(table, band, levels=wanted)]
        numbers = [number for part in found for number in part.sections]
        expected = [number for number, section in enumerate(table.sections) if section.level < read]
        assert sorted(numbers) == expected
        assert sum(part.length for part in found) == sum(table.sections[number].stored_length for number in expected)
        assert all(table.sections[part.sections[0]].offset == part.start for part in found)
        assert all(table.sections[part.sections[-1]].end == part.end for part in found)
        if len(bands) == 1:
            assert len(found) == 1, "all layers are one range"
        for band in bands:
            places = group_levels(table, [n for part in band_ranges(table, band, levels=wanted) for n in part.sections])
            assert all([table.sections[n].level for n in place] == list(range(read)) for place in places)


def test_neighbours_over_a_small_gap_are_one_request_and_over_a_large_one_two() -> None:
    sections = [(0, 100), (110, 200), (211, 300)]
    assert plan_ranges(sections, max_bytes=1000, gap_bytes=10) == [Request(0, 200, (0, 1)), Request(211, 300, (2,))]
    assert plan_ranges(sections, max_bytes=1000, gap_bytes=11) == [Request(0, 300, (0, 1, 2))]
    assert plan_ranges(sections[:2], max_bytes=1000, gap_bytes=9) == [Request(0, 100, (0,)), Request(110, 200, (1,))]


def test_a_request_stops_before_the_section_that_would_make_it_too_large() -> None:
    sections = [(0, 100), (100, 200), (200, 300)]
    assert plan_ranges(sections, max_bytes=299, gap_bytes=0) == [Request(0, 200, (0, 1)), Request(200, 300, (2,))]


def test_only_a_section_that_is_too_large_itself_is_cut_and_shares_no_request() -> None:
    assert plan_ranges([(0, 50), (50, 260), (260, 270)], max_bytes=100, gap_bytes=9) == [
        Request(0, 50, (0,)),
        Request(50, 120, (1,)),
        Request(120, 190, (1,)),
        Request(190, 260, (1,)),
        Request(260, 270, (2,)),
    ]


def test_sections_may_come_in_any_order() -> None:
    assert plan_ranges([(50, 60), (0, 50)], max_bytes=100, gap_bytes=0) == [Request(0, 60, (1, 0))]


def test_nothing_wanted_is_nothing_read() -> None:
    assert plan_ranges([], max_bytes=1, gap_bytes=0) == []


@pytest.mark.parametrize("sections", [[(5, 5)], [(0, 10), (9, 20)], [(-1, 4)], [(3, 2)]])
def test_empty_or_overlapping_sections_are_refused(sections: list[tuple[int, int]]) -> None:
    with pytest.raises(InvalidArgumentError):
        plan_ranges(sections, max_bytes=100, gap_bytes=0)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 400)), max_size=40),
    st.integers(1, 1000),
    st.integers(0, 50),
    st.randoms(use_true_random=False),
)
def test_requests_cover_each_section_exactly_and_no_more_than_small_gaps(
    steps: list[tuple[int, int]], max_bytes: int, gap_bytes: int, random: Random
) -> None:
    sections: list[tuple[int, int]] = []
    position = 0
    for gap, length in steps:
        sections.append((position + gap, position + gap + length))
        position = sections[-1][1]
    random.shuffle(sections)
    plan = plan_ranges(sections, max_bytes=max_bytes, gap_bytes=gap_bytes)
    assert all(before.end <= after.start for before, after in pairwise(plan)), "no overlap"
    assert all(0 < request.end - request.start <= max_bytes for request in plan)
    for number, (start, end) in enumerate(sections):
        reading = [request for request in plan if number in request.parts]
        cut = end - start > max_bytes
        assert (len(reading) > 1) == cut
        if cut:
            assert all(request.parts == (number,) for request in reading)
            assert (reading[0].start, reading[-1].end) == (start, end)
            assert all(before.end == after.start for before, after in pairwise(reading))
            sizes = [request.end - request.start for request in reading]
            assert max(sizes) - min(sizes) <= 1
        else:
            assert reading[0].start <= start < end <= reading[0].end
    for request in plan:
        inside = sorted(sections[number] for number in request.parts)
        assert request.start >= inside[0][0]
        assert request.end <= inside[-1][1]
        assert all(after[0] - before[1] <= gap_bytes for before, after in pairwise(inside))
    for before, after in pairwise(plan):
        start, end = min(sections[number] for number in after.parts)
        pieces = any(sections[number][1] - sections[number][0] > max_bytes for number in before.parts + after.parts)
        assert pieces or start - before.end > gap_bytes or end - before.start > max_bytes, "one request would do"
