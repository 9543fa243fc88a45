"""Planning of range reads: exact cover, no cut sections, in layer order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.bitstream import PARTS_K, PARTS_KV, PARTS_V, Section, SectionTable
from kvstore_s3.transfer.ranges import Band, band_range, plan_bands


def table_of(groups: list[int], length: int = 100, apart: bool = False) -> SectionTable:
    sections: list[Section] = []
    layer, offset = 0, 256
    for layers in groups:
        for parts in (PARTS_K, PARTS_V) if apart else (PARTS_KV,):
            sections.append(Section(0, parts, 0, layer, layer + layers, offset, length))
            offset = sections[-1].end
        layer += layers
    return SectionTable(256, tuple(sections))


def test_neighbours_are_joined_up_to_the_limit() -> None:
    table = table_of([2, 2, 2, 2])
    assert plan_bands([table], 112) == [Band(0, 2), Band(2, 4), Band(4, 6), Band(6, 8)]
    assert plan_bands([table], 224) == [Band(0, 4), Band(4, 8)]
    assert plan_bands([table], 10_000) == [Band(0, 8)]


def test_a_section_larger_than_the_limit_is_a_band_of_its_own() -> None:
    assert plan_bands([table_of([4, 4])], 1) == [Band(0, 4), Band(4, 8)]


def test_a_band_never_cuts_a_section_of_any_object() -> None:
    assert plan_bands([table_of([2, 2, 2]), table_of([3, 3])], 1) == [Band(0, 6)]


def test_k_and_v_apart_belong_to_one_band() -> None:
    found = band_range(table_of([2, 2], apart=True), Band(2, 4))
    assert (list(found.sections), found.start, found.end) == ([2, 3], 480, 704)


@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=12), min_size=1, max_size=4),
    st.integers(1, 2000),
)
def test_bands_cover_every_section_of_every_object_once(all_groups: list[list[int]], limit: int) -> None:
    layers = max(sum(groups) for groups in all_groups)
    tables = [table_of([*groups, *([1] * (layers - sum(groups)))]) for groups in all_groups]
    bands = plan_bands(tables, limit)
    assert (bands[0].layer_begin, bands[-1].layer_end) == (0, layers)
    for table in tables:
        found = [band_range(table, band) for band in bands]
        assert [number for part in found for number in part.sections] == list(range(len(table.sections)))
        assert [part.start for part in found[1:]] == [part.end for part in found[:-1]]
