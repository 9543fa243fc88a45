"""How an object is cut into parts."""

from __future__ import annotations

import pytest

from kvstore_s3.objectstore.s3_multipart import split_parts


@pytest.mark.parametrize("size", [1, 99, 100, 101, 250, 1_000_000])
def test_parts_are_numbered_from_one_and_cover_the_object_without_copying(size: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    parts = list(split_parts(memoryview(data)[:size], 100))
    assert [part.number for part in parts] == list(range(1, -(-size // 100) + 1))
    assert b"".join(part.data for part in parts) == data[:size]
    assert all(len(part.data) == 100 for part in parts[:-1])
    assert all(part.data.obj is data for part in parts)


def test_parts_grow_where_ten_thousand_would_not_do() -> None:
    data = memoryview(bytes(1_000_001))
    assert len(list(split_parts(data[:-1], 100))) == 10_000
    assert [len(part.data) for part in split_parts(data, 100)] == [1_000_001]
