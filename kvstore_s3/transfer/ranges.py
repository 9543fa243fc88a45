"""Which byte ranges to read: bands of layers, and in each as many levels as the reader wants. Pure.

Sections of one level are neighbours in layer order, and levels lie one after the other. So a band is one range for each
level, and where it has all layers, one range in all. `plan_ranges` then says by which requests ranges are read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from kvstore_s3.bitstream import Section, SectionTable
from kvstore_s3.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class Band:
    """Layers `layer_begin` to `layer_end`, read together from each object of a hit."""

    layer_begin: int
    layer_end: int


@dataclass(frozen=True, slots=True)
class BandRange:
    """One range of one object: `sections` are numbers in its index, neighbours in the object."""

    sections: range
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Request:
    """Bytes `start` to `end` of an object, to be read by one request.

    `parts` are the numbers of the wanted ranges that lie inside it, by position; where it is a piece of a single range
    that is too large for one request, that one's number.
    """

    start: int
    end: int
    parts: tuple[int, ...]


def count_levels(table: SectionTable) -> int:
    """How many levels an object has."""
    return table.sections[-1].level + 1


def plan_bands(
    tables: Sequence[SectionTable], range_bytes: int, *, levels: int = 1, within: Band | None = None
) -> list[Band]:
    """Cut the layers where no object has a section across, then join neighbours up to `range_bytes` an object.

    `levels` are those wanted; an object that has fewer gives what it has. Objects may have been written with different
    layer groups, and hold different layers. A band never cuts a section of any of them, but at the ends of `within`,
    the layers that are wanted (None: all).
    """
    begin = within.layer_begin if within else min(table.sections[0].layer_begin for table in tables)
    end = within.layer_end if within else max(table.sections[-1].layer_end for table in tables)
    inner = {layer for table in tables for layer in _layers_across(table)}
    boundaries = [begin, *(layer for layer in range(begin + 1, end) if layer not in inner), end]
    sizes = [_sizes_up_to(table, levels, boundaries) for table in tables]
    bands: list[Band] = []
    first = 0
    for number, (start, stop) in enumerate(pairwise(boundaries)):
        if bands and max(size[number + 1] - size[first] for size in sizes) <= range_bytes:
            bands[-1] = Band(bands[-1].layer_begin, stop)
        else:
            bands.append(Band(start, stop))
            first = number
    return bands


def has_boundaries(table: SectionTable, band: Band) -> bool:
    """Whether `band` cuts no section of `table`."""
    return {band.layer_begin, band.layer_end} <= _boundaries(table)


def band_ranges(table: SectionTable, band: Band, *, levels: int = 1) -> list[BandRange]:
    """The sections of `table` that have layers of `band` in the first `levels` levels, in the object's order.

    There is one at least. One range for each level; ranges without a gap between them are one.
    """
    ranges: list[BandRange] = []
    for level in range(min(levels, count_levels(table))):
        numbers = [n for n, section in enumerate(table.sections) if section.level == level and _meets(section, band)]
        first, last = numbers[0], numbers[-1]
        start, end = table.sections[first].offset, table.sections[last].end
        if ranges and ranges[-1].end == start:
            ranges[-1] = BandRange(range(ranges[-1].sections.start, last + 1), ranges[-1].start, end)
        else:
            ranges.append(BandRange(range(first, last + 1), start, end))
    return ranges


def group_levels(table: SectionTable, numbers: Sequence[int]) -> list[list[int]]:
    """Numbers of sections, those of one place (layers and parts) together, base first: they are decoded together."""
    places: dict[tuple[int, int, int], list[int]] = {}
    for number in numbers:
        section = table.sections[number]
        places.setdefault((section.layer_begin, section.layer_end, section.parts), []).append(number)
    return list(places.values())


def _boundaries(table: SectionTable) -> set[int]:
    base = [section for section in table.sections if section.level == 0]
    return {base[0].layer_begin, *(section.layer_end for section in base)}


def _layers_across(table: SectionTable) -> Iterator[int]:
    """Layers at which a cut would go through a section."""
    for section in table.sections:
        if section.level:
            return
        yield from range(section.layer_begin + 1, section.layer_end)


def _meets(section: Section, band: Band) -> bool:
    return section.layer_begin < band.layer_end and band.layer_begin < section.layer_end


def _sizes_up_to(table: SectionTable, levels: int, boundaries: Sequence[int]) -> list[int]:
    """Stored bytes of the wanted levels before each of `boundaries`, a section counted where its wanted layers are."""
    sizes, all_layers = [0] * len(boundaries), Band(boundaries[0], boundaries[-1])
    for section in table.sections:
        if section.level < levels and _meets(section, all_layers):
            sizes[bisect_right(boundaries, max(section.layer_begin, boundaries[0]))] += section.stored_length
    return list(accumulate(sizes))


def plan_ranges(sections: Sequence[tuple[int, int]], *, max_bytes: int, gap_bytes: int) -> list[Request]:
    """Requests that read `sections`, (start, end) each, in any order: sorted by position, never overlapping.

    Neighbours with at most `gap_bytes` between them are read by one request of up to `max_bytes`, the gap along with
    them: a request costs more than a few unwanted bytes. A section is cut only where it is larger than `max_bytes`
    itself, into requests of about equal size that share no other section. Raises `InvalidArgumentError` where sections
    are empty or overlap.
    """
    plan: list[Request] = []
    reached, open_request = 0, False
    for number in sorted(range(len(sections)), key=sections.__getitem__):
        start, end = sections[number]
        if not reached <= start < end:
            raise InvalidArgumentError(f"bytes {start} to {end} are empty or overlap with those before {reached}")
        if end - start > max_bytes:
            plan += _cut_section(start, end, number, max_bytes)
            open_request = False
        elif open_request and start - reached <= gap_bytes and end - plan[-1].start <= max_bytes:
            plan[-1] = Request(plan[-1].start, end, (*plan[-1].parts, number))
        else:
            plan.append(Request(start, end, (number,)))
            open_request = True
        reached = end
    return plan


def _cut_section(start: int, end: int, number: int, max_bytes: int) -> list[Request]:
    count = -(-(end - start) // max_bytes)
    cuts = [start + (end - start) * index // count for index in range(count + 1)]
    return [Request(begin, stop, (number,)) for begin, stop in pairwise(cuts)]
