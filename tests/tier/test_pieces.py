"""A piece that comes in any order is written once, page by page."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_s3.tier.base import PAGE
from kvstore_s3.tier.extents import Extent
from kvstore_s3.tier.pieces import Piece, file_position, file_size


@given(st.integers(0, 3 * PAGE), st.integers(1, 6 * PAGE), st.lists(st.integers(0, 6 * PAGE)), st.randoms())
@settings(max_examples=200, deadline=None)
def test_offers_in_any_order_with_overlaps_become_the_image_of_the_object(
    start: int, size: int, cuts: list[int], order: random.Random
) -> None:
    extent = Extent("a", start, start + size)
    content = order.randbytes(size)
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    offers = [*pairwise(edges), (0, edges[1])]
    order.shuffle(offers)
    piece, image, written = Piece(extent), bytearray(file_size(extent)), set[int]()
    for begin, end in offers:
        for position, data in piece.take(start + begin, memoryview(content)[begin:end]):
            assert position % PAGE == len(data) % PAGE == 0
            pages = set(range(position, position + len(data), PAGE))
            assert not pages & written
            written |= pages
            image[position : position + len(data)] = data
    assert piece.is_whole
    assert written == set(range(PAGE, len(image), PAGE))
    at = file_position(extent, start)
    assert image[at : at + size] == content


def test_a_piece_with_a_hole_is_not_whole_and_its_torn_page_is_not_written() -> None:
    piece = Piece(Extent("a", 0, 2 * PAGE))
    assert piece.take(100, memoryview(bytes(PAGE))) == []
    assert not piece.is_whole


def test_skipped_bytes_count_like_taken_ones() -> None:
    piece = Piece(Extent("a", 10, 30))
    piece.skip(20, 30)
    assert not piece.is_whole
    piece.skip(10, 25)
    assert piece.is_whole


@pytest.mark.parametrize(
    ("start", "end", "pages"), [(0, 1, 2), (0, PAGE, 2), (PAGE - 1, PAGE + 1, 3), (PAGE, 3 * PAGE, 3)]
)
def test_a_file_is_its_header_and_the_pages_that_its_bytes_touch(start: int, end: int, pages: int) -> None:
    assert file_size(Extent("a", start, end)) == pages * PAGE
    assert (file_position(Extent("a", start, end), start) - start) % PAGE == 0
