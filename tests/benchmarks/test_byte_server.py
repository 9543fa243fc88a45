"""The byte server of `make bench-io`: what it moves must be what was put there, or its figures mean nothing."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from io_servers import (
    BUCKET,
    OBJECT,
    OBJECT_BYTES,
    Endpoint,
    build_byte_server,
    byte_server,
    make_certificate,
    object_bytes,
)

from kvstore_s3.config import Settings
from kvstore_s3.errors import DamagedObjectError, ObjectNotFoundError
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.objectstore.open import open_store

if shutil.which("c++") is None:
    pytest.skip("the byte server needs a C++ compiler", allow_module_level=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    return build_byte_server(tmp_path_factory.mktemp("byte_server"))


@pytest.fixture(scope="module")
def plain(program: tuple[Path, bool]) -> Iterator[Endpoint]:
    with byte_server(program[0]) as endpoint:
        yield endpoint


def open_at(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    for name, value in endpoint.environment().items():
        monkeypatch.setenv(name, value)
    return open_store(f"s3://{BUCKET}", Settings(endpoint_url=endpoint.url))


async def test_the_byte_server_gives_back_what_was_put_there(plain: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_at(plain, monkeypatch)
    data = bytes(range(256)) * 4096
    assert await store.put("a/b", data, metadata={"hint": "kept as it was"})
    assert not await store.put("a/b", b"another")
    info = await store.head("a/b")
    assert info is not None
    assert (info.size, info.metadata) == (len(data), {"hint": "kept as it was"})
    into = bytearray(1000)
    await store.get_range("a/b", 5000, memoryview(into))
    assert into == data[5000:6000]
    await store.delete("a/b")
    assert await store.head("a/b") is None
    await store.close()


async def test_the_byte_server_has_no_bytes_that_were_not_put(plain: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_at(plain, monkeypatch)
    await store.probe()
    with pytest.raises(ObjectNotFoundError):
        await store.get_range("absent", 0, memoryview(bytearray(10)))
    with pytest.raises(DamagedObjectError):
        await store.get_range(OBJECT, OBJECT_BYTES - 5, memoryview(bytearray(10)))
    assert await store.put("bench/sink/dropped", b"bytes")
    assert await store.head("bench/sink/dropped") is None
    await store.close()


async def test_the_byte_server_speaks_tls(
    program: tuple[Path, bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not program[1]:
        pytest.skip("OpenSSL's headers are not installed")
    with byte_server(program[0], tls=make_certificate(tmp_path)) as endpoint:
        store = open_at(endpoint, monkeypatch)
        into = bytearray(3 << 20)
        await store.get_range(OBJECT, 1 << 20, memoryview(into))
        assert into == object_bytes()[1 << 20 : 4 << 20]
        await store.close()


async def test_an_answer_is_held_back_by_the_latency(
    program: tuple[Path, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    with byte_server(program[0], latency_ms=30) as endpoint:
        store = open_at(endpoint, monkeypatch)
        await store.probe()
        began = time.perf_counter()
        assert await store.head(OBJECT) is not None
        assert time.perf_counter() - began >= 0.03
        await store.close()
