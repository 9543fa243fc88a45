"""memory:// passes the suite, and shares by name."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from objectstore.suite import KEY, ObjectStoreSuite

from kvstore_s3.config import Settings
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.objectstore.open import open_store


class TestMemoryStore(ObjectStoreSuite):
    @pytest.fixture
    async def store(self) -> AsyncIterator[ObjectStore]:
        store = open_store("memory://", Settings())
        yield store
        await store.close()


async def test_a_name_is_shared_within_the_process() -> None:
    one, other = open_store("memory://shared-name", Settings()), open_store("memory://shared-name", Settings())
    await one.put(KEY, b"x")
    await one.close()
    assert await other.head(KEY) is not None
    await other.delete(KEY)


async def test_a_bare_memory_store_is_private() -> None:
    one, other = open_store("memory://", Settings()), open_store("memory://", Settings())
    await one.put(KEY, b"x")
    assert await other.head(KEY) is None
