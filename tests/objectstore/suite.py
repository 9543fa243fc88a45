"""What every object store must do. A test module subclasses `ObjectStoreSuite` and provides the fixture `store`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable

import pytest

from kvstore_s3.config import MiB
from kvstore_s3.errors import (
    BitstreamFault,
    DamagedObjectError,
    InvalidArgumentError,
    ObjectNotFoundError,
    StoreUnavailableError,
)
from kvstore_s3.objectstore.base import MAX_METADATA_BYTES, ObjectInfo, ObjectStore

KEY = "llama/" + "ab" * 32 + "/" + "cd" * 32 + "/l0-32.h0-8"
PART = 5 * MiB
"""The part size that the stores under test are opened with: the smallest that S3 allows."""

PATIENCE_S = 60.0
"""For what ends at once or never: no machine is so busy."""


async def read(store: ObjectStore, key: str, start: int, length: int) -> bytes:
    buffer = bytearray(length)
    await store.get_range(key, start, memoryview(buffer))
    return bytes(buffer)


async def names(listing: AsyncIterator[ObjectInfo]) -> list[str]:
    return sorted([info.key async for info in listing])


class ObjectStoreSuite:
    @pytest.fixture
    def page(self) -> int:
        """Objects in one page of a listing."""
        return 1000

    @pytest.fixture
    def atomic(self) -> None:
        """Skips where the server is too simple to decide between two writers."""

    async def test_it_is_an_object_store_and_can_be_probed(self, store: ObjectStore) -> None:
        assert isinstance(store, ObjectStore)
        await store.probe()

    async def test_what_was_put_is_read_back(self, store: ObjectStore) -> None:
        assert await store.put(KEY, b"some bytes")
        assert await read(store, KEY, 0, 10) == b"some bytes"
        assert await store.head(KEY) == ObjectInfo(KEY, 10, {})

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    async def test_any_buffer_can_be_put(self, store: ObjectStore, kind: Callable[[bytes], bytes]) -> None:
        await store.put(KEY, kind(b"some bytes"))
        assert await read(store, KEY, 0, 10) == b"some bytes"

    async def test_an_object_that_exists_is_left_alone(self, store: ObjectStore) -> None:
        assert await store.put(KEY, b"first", metadata={"by": "first"}) is True
        assert await store.put(KEY, b"second, longer", metadata={"by": "second"}) is False
        assert await read(store, KEY, 0, 5) == b"first"

    async def test_an_object_is_replaced_on_request(self, store: ObjectStore) -> None:
        await store.put(KEY, b"first, longer", metadata={"by": "first"})
        assert await store.put(KEY, b"second", metadata={"by": "second"}, replace=True) is True
        assert await store.head(KEY) == ObjectInfo(KEY, 6, {"by": "second"})
        assert await read(store, KEY, 0, 6) == b"second"

    async def test_replacing_what_is_not_there_creates_it(self, store: ObjectStore) -> None:
        assert await store.put(KEY, b"x", replace=True) is True
        assert await store.put(KEY, b"y") is False

    async def test_an_empty_object_is_an_object(self, store: ObjectStore) -> None:
        assert await store.put(KEY, b"") is True
        assert await store.put(KEY, b"x") is False
        assert await store.head(KEY) == ObjectInfo(KEY, 0, {})
        assert await read(store, KEY, 0, 0) == b""

    @pytest.mark.parametrize("size", [PART, PART + 1, 2 * PART, 2 * PART + 12345])
    async def test_large_objects_survive(self, store: ObjectStore, size: int) -> None:
        data = os.urandom(size)
        assert await store.put(KEY, data, metadata={"size": str(size)}) is True
        assert await store.head(KEY) == ObjectInfo(KEY, size, {"size": str(size)})
        assert await read(store, KEY, 0, size) == data
        assert await read(store, KEY, PART - 6, 6) == data[PART - 6 : PART]
        assert await read(store, KEY, size - 7, 7) == data[-7:]

    async def test_a_large_object_that_exists_is_left_alone_or_replaced(self, store: ObjectStore) -> None:
        first, second = os.urandom(PART + 1), os.urandom(PART + 2)
        assert await store.put(KEY, first) is True
        assert await store.put(KEY, second) is False
        assert await read(store, KEY, 0, PART + 1) == first
        assert await store.put(KEY, second, replace=True) is True
        assert await read(store, KEY, 0, PART + 2) == second

    async def test_ranges_are_exact(self, store: ObjectStore) -> None:
        data = os.urandom(1000)
        await store.put(KEY, data)
        for start, length in [(0, 1), (0, 1000), (1, 998), (999, 1), (500, 0), (1000, 0)]:
            assert await read(store, KEY, start, length) == data[start : start + length]

    async def test_a_range_fills_the_callers_memory_and_nothing_beside_it(self, store: ObjectStore) -> None:
        await store.put(KEY, b"0123456789")
        buffer = bytearray(b"." * 8)
        await store.get_range(KEY, 3, memoryview(buffer)[2:6])
        assert buffer == b"..3456.."

    @pytest.mark.parametrize(("start", "length"), [(0, 11), (5, 6), (9, 2), (10, 1), (11, 0), (5000, 10)])
    async def test_a_range_past_the_end_is_a_truncated_object(
        self, store: ObjectStore, start: int, length: int
    ) -> None:
        await store.put(KEY, b"0123456789")
        with pytest.raises(DamagedObjectError) as caught:
            await read(store, KEY, start, length)
        assert caught.value.code is BitstreamFault.TRUNCATED

    async def test_a_range_of_an_empty_object_is_truncated(self, store: ObjectStore) -> None:
        await store.put(KEY, b"")
        with pytest.raises(DamagedObjectError):
            await read(store, KEY, 0, 1)

    @pytest.mark.parametrize("length", [0, 1])
    async def test_a_missing_object_is_not_found(self, store: ObjectStore, length: int) -> None:
        assert await store.head(KEY) is None
        with pytest.raises(ObjectNotFoundError):
            await read(store, KEY, 0, length)

    @pytest.mark.usefixtures("atomic")
    async def test_one_of_several_writers_wins(self, store: ObjectStore) -> None:
        bodies = [bytes([number]) * 5000 for number in range(8)]
        created = await asyncio.gather(*(store.put(KEY, body) for body in bodies))
        assert created.count(True) == 1
        assert await read(store, KEY, 0, 5000) == bodies[created.index(True)]

    @pytest.mark.usefixtures("atomic")
    async def test_one_of_two_writers_of_a_large_object_wins(self, store: ObjectStore) -> None:
        bodies = [bytes([number]) * (PART + 1) for number in range(2)]
        created = await asyncio.gather(*(store.put(KEY, body) for body in bodies))
        assert created.count(True) == 1
        assert await read(store, KEY, 0, PART + 1) == bodies[created.index(True)]

    async def test_readers_see_one_version_or_the_other_while_it_is_replaced(self, store: ObjectStore) -> None:
        versions = {bytes([number]) * 5000 for number in range(6)}
        await store.put(KEY, bytes(5000))

        async def replace() -> None:
            for version in sorted(versions):
                await store.put(KEY, version, replace=True)

        replacing = asyncio.create_task(replace())
        while not replacing.done():
            assert await read(store, KEY, 0, 5000) in versions
            await asyncio.sleep(0)
        await replacing

    async def test_objects_are_listed_by_prefix(self, store: ObjectStore) -> None:
        for key in ("a/b/one", "a/b/two", "a/bc", "b"):
            await store.put(key, key.encode())
        assert await names(store.list()) == ["a/b/one", "a/b/two", "a/bc", "b"]
        assert await names(store.list("a/b")) == ["a/b/one", "a/b/two", "a/bc"]
        assert await names(store.list("a/b/")) == ["a/b/one", "a/b/two"]
        assert await names(store.list("a/b/t")) == ["a/b/two"]
        assert await names(store.list("b")) == ["b"]
        assert await names(store.list("c/d")) == []
        assert [info async for info in store.list("a/bc")] == [ObjectInfo("a/bc", 4, {})]

    async def test_a_listing_goes_on_after_its_first_page(self, store: ObjectStore, page: int) -> None:
        wanted = [f"many/{number:04}" for number in range(page + 1)]
        async with asyncio.TaskGroup() as group:
            for key in wanted:
                group.create_task(store.put(key, b"x"))
        assert await names(store.list("many/")) == wanted

    async def test_an_object_may_vanish_while_it_is_listed(self, store: ObjectStore) -> None:
        for number in range(4):
            await store.put(f"gone/{number}", b"x")
        async for info in store.list("gone/"):
            await store.delete(info.key)
        assert await names(store.list("gone/")) == []

    async def test_delete_is_idempotent(self, store: ObjectStore) -> None:
        await store.put(KEY, b"x")
        await store.delete(KEY)
        await store.delete(KEY)
        assert await store.head(KEY) is None
        assert await names(store.list()) == []
        assert await store.put(KEY, b"y") is True

    async def test_metadata_up_to_the_limit_comes_back(self, store: ObjectStore) -> None:
        metadata = {
            "kvs-index": "x" * (MAX_METADATA_BYTES - 9 - 5),
            "v": "a b;",
        }
        assert sum(len(name) + len(value) for name, value in metadata.items()) == MAX_METADATA_BYTES
        await store.put(KEY, b"x", metadata=metadata)
        found = await store.head(KEY)
        assert found is not None
        assert found.metadata == metadata

    @pytest.mark.parametrize(
        "metadata",
        [
            {"a": "x" * MAX_METADATA_BYTES},
            {"Upper": "x"},
            {"under_score": "x"},
            {"a": ""},
            {"a": " x"},
            {"a": "x\r\nx-amz-acl: public-read"},
            {"a": "\u00e9"},
        ],
    )
    async def test_metadata_that_headers_would_change_are_refused(
        self, store: ObjectStore, metadata: dict[str, str]
    ) -> None:
        with pytest.raises(InvalidArgumentError):
            await store.put(KEY, b"x", metadata=metadata)
        assert await store.head(KEY) is None

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "/a",
            "a/",
            "a//b",
            "..",
            "a/../b",
            ".tmp/x",
            "a/.b",
            "A",
            "a b",
            "a\\b",
            "a\0",
            "a\n",
            "\u00e9",
            "a" * 513,
        ],
    )
    async def test_bad_keys_are_refused_by_every_verb(self, store: ObjectStore, key: str) -> None:
        with pytest.raises(InvalidArgumentError):
            await store.put(key, b"x")
        with pytest.raises(InvalidArgumentError):
            await store.head(key)
        with pytest.raises(InvalidArgumentError):
            await read(store, key, 0, 1)
        with pytest.raises(InvalidArgumentError):
            await store.delete(key)

    @pytest.mark.parametrize("prefix", ["/", "..", "a/../", "a//", ".tmp/", "A"])
    async def test_bad_prefixes_are_refused(self, store: ObjectStore, prefix: str) -> None:
        with pytest.raises(InvalidArgumentError):
            await names(store.list(prefix))

    async def test_a_buffer_that_cannot_be_filled_is_refused(self, store: ObjectStore) -> None:
        await store.put(KEY, b"0123456789")
        with pytest.raises(InvalidArgumentError):
            await store.get_range(KEY, 0, memoryview(b"read only"))
        with pytest.raises(InvalidArgumentError):
            await store.get_range(KEY, 0, memoryview(bytearray(8))[::2])
        with pytest.raises(InvalidArgumentError):
            await store.get_range(KEY, -1, memoryview(bytearray(1)))

    async def test_a_cancelled_put_leaves_nothing_or_the_whole_object(self, store: ObjectStore) -> None:
        data = os.urandom(3 * PART)
        for turns in (0, 1, 3, 10, 30):
            task = asyncio.create_task(store.put(KEY, data))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if (found := await store.head(KEY)) is not None:
                assert await read(store, KEY, 0, found.size) == data
            await store.delete(KEY)

    async def test_a_cancelled_read_does_not_touch_the_buffer_afterwards(self, store: ObjectStore) -> None:
        await store.put(KEY, b"\xff" * (3 * PART))
        buffer = bytearray(3 * PART)
        for turns in (0, 1, 3, 10, 30, 100):
            task = asyncio.create_task(store.get_range(KEY, 0, memoryview(buffer)))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            buffer[:] = bytes(len(buffer))
            await read(store, KEY, 0, len(buffer))  # time enough for a late write
            assert not any(buffer)

    async def test_a_closed_store_says_so_and_can_be_closed_again(self, store: ObjectStore) -> None:
        await store.put(KEY, b"x")
        await store.close()
        await store.close()
        with pytest.raises(StoreUnavailableError, match="closed"):
            await store.head(KEY)
