"""Which byte ranges to read: bands of layers that every object of a hit can serve with one range. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvstore_s3.bitstream import Section, SectionTable


@dataclass(frozen=True, slots=True)
class Band:
    """Layers `layer_begin` to `layer_end`, read together from each object of a hit."""

    layer_begin: int
    layer_end: int


@dataclass(frozen=True, slots=True)
class BandRange:
    """One object's part of a band: `sections` are numbers in its index, neighbours in the object."""

    sections: range
    start: int
    end: int


def plan_bands(tables: Sequence[SectionTable], range_bytes: int) -> list[Band]:
    """Cut the layers where all objects have a section boundary, then join neighbours up to `range_bytes` an object.

    Objects may have been written with different layer groups; a band never cuts a section of any of them.
    """
    boundaries = sorted(set.intersection(*(_boundaries(table) for table in tables)))
    offsets = [_offsets(table) for table in tables]
    bands: list[Band] = []
    for begin, end in pairwise(boundaries):
        joined = Band(bands[-1].layer_begin if bands else begin, end)
        if (
            bands
            and max(ends[joined.layer_end] - starts[joined.layer_begin] for starts, ends in offsets) <= range_bytes
        ):
            bands[-1] = joined
        else:
            bands.append(Band(begin, end))
    return bands


def has_boundaries(table: SectionTable, band: Band) -> bool:
    """Whether `band` cuts no section of `table`."""
    return {band.layer_begin, band.layer_end} <= _boundaries(table)


def band_range(table: SectionTable, band: Band) -> BandRange:
    """The base-level sections of `table` inside `band`; they are neighbours, since an index is in layer order."""
    numbers = [n for n, section in enumerate(table.sections) if _inside(section, band)]
    first, last = table.sections[numbers[0]], table.sections[numbers[-1]]
    return BandRange(range(numbers[0], numbers[-1] + 1), first.offset, last.end)


def _boundaries(table: SectionTable) -> set[int]:
    base = [section for section in table.sections if section.level == 0]
    return {base[0].layer_begin, *(section.layer_end for section in base)}


def _inside(section: Section, band: Band) -> bool:
    return section.level == 0 and band.layer_begin <= section.layer_begin and section.layer_end <= band.layer_end


def _offsets(table: SectionTable) -> tuple[dict[int, int], dict[int, int]]:
    """Where the base level's first section from a layer on starts, and where the last one up to a layer ends."""
    base = [section for section in table.sections if section.level == 0]
    starts = {section.layer_begin: section.offset for section in reversed(base)}
    return starts, {section.layer_end: section.end for section in base}
