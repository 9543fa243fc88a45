"""A prompt's KV in a store behind the fault proxy, an engine that asks for it, and what must hold whatever happens.

The promises, by their numbers: P1 never a wrong value; P2 the request completes, by recomputing if need be; P3 nothing
leaks; P4 the time is bounded; P5 it is counted, and logged once without secrets.
"""

from __future__ import annotations

import hashlib
import io
import logging
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from fault_proxy import FaultProxy
from local_server import LocalServer
from servers import BUCKET

from kvstore_s3 import KVLayout, KVStore, Namespace, Settings
from kvstore_s3.errors import KVStoreError
from kvstore_s3.hashing import chunk_keys, root_key

REAL = [pytest.param("minio", marks=pytest.mark.server), pytest.param("versitygw", marks=pytest.mark.server)]
ON_REAL_SERVERS = pytest.mark.parametrize("server", REAL, indirect=True)
"""For tests that ask more of a server than moto does, or take longer than the quick tests should."""

CHUNKS = 4
LAYOUT = KVLayout(layers=6, kv_heads=4, head_dim=64, dtype="bfloat16")
NAMESPACE = Namespace(model="tiny", revision="1", layout=LAYOUT, chunk_tokens=32)
TOKENS = list(range(100, 100 + CHUNKS * NAMESPACE.chunk_tokens))
MARGIN_S = 1.0
"""For what is not waiting: two busy cores may be slow."""
PATIENT = {"read_timeout_s": 30.0, "request_deadline_s": 60.0}
"""Settings for faults that no time-out is to end."""


def measure_patience() -> float:
    """How many times longer than on a busy machine all takes on this one now: a short time-out that ends what goes well
    would be taken for a fault. 1 where three processes share two cores.
    """
    begin, work = time.monotonic(), time.thread_time() + 0.02
    while time.thread_time() < work:
        pass
    return min(max(1.0, (time.monotonic() - begin) / 0.02 / 1.5), 10.0)


def random_kv(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYOUT.layers, 2, len(TOKENS), LAYOUT.kv_heads, LAYOUT.head_dim)
    return torch.randn(shape, generator=generator).to(torch.bfloat16)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    words = (one.contiguous().view(torch.uint16), other.contiguous().view(torch.uint16))
    return one.shape == other.shape and bool((words[0] == words[1]).all())


@dataclass(frozen=True, slots=True)
class Served:
    """How an engine fared: tokens of the hit that were loaded, what failed, and how long it waited for the store."""

    tokens: int
    error: KVStoreError | None
    seconds: float


async def serve(store: KVStore, kv: torch.Tensor) -> Served:
    """What an engine does with a prompt: look up, load, and compute the rest itself. Asserts P1 and P2."""
    loaded, failed = kv[:, :, :0], None
    begin = time.monotonic()
    try:
        loaded = await store.load(await store.lookup(TOKENS))
    except KVStoreError as error:
        failed = error
    seconds = time.monotonic() - begin
    tokens = loaded.shape[2]
    assert tokens % NAMESPACE.chunk_tokens == 0
    assert same_bits(loaded, kv[:, :, :tokens]), "P1: a wrong value went into the engine"
    computed = torch.cat([loaded, kv[:, :, tokens:]], dim=2)
    assert same_bits(computed, kv), "P2: the request did not complete"
    return Served(tokens, failed, seconds)


@dataclass(slots=True)
class Scene:
    """A prefix of its own in a real server's bucket, seen through the proxy."""

    server: LocalServer
    proxy: FaultProxy
    cache_dir: Path
    patience: float = field(default_factory=lambda: measure_patience())
    prefix: str = field(default_factory=lambda: f"faults/{secrets.token_hex(6)}")
    kv: torch.Tensor = field(default_factory=random_kv)

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/{self.prefix}"

    def settings(self, **overrides: object) -> Settings:
        """Impatient ones, so that a fault that lasts costs a test a second or two; less so on an overloaded machine."""
        given: dict[str, object] = {
            "endpoint_url": self.proxy.endpoint,
            "layer_group": 2,
            "range_bytes": 64 * 1024,
            "connect_timeout_s": 5.0,
            "read_timeout_s": 0.5 * self.patience,
            "request_deadline_s": 4.0 * self.patience,
            "multipart_bytes": 5 * 1024 * 1024,
            "cache_dir": self.cache_dir,
        }
        return Settings(**{**given, **overrides})

    def open(self, *, probe: bool = True, **overrides: object) -> KVStore:
        return KVStore.open(self.url, NAMESPACE, self.settings(**overrides), probe=probe)

    async def fill(self) -> None:
        """Save the prompt, past the proxy."""
        async with self.open(endpoint_url=self.server.endpoint, read_timeout_s=60, request_deadline_s=100) as store:
            assert (await store.save(TOKENS, self.kv)).chunks_new == CHUNKS

    @property
    def keys(self) -> list[str]:
        """Keys of the prompt's objects in the bucket, in its order."""
        keys = chunk_keys(root_key(NAMESPACE.digest, None), TOKENS, NAMESPACE.chunk_tokens)
        return [f"{self.prefix}/{NAMESPACE.hex}/{key.hex()}/{LAYOUT.full_shard.name}" for key in keys]

    def read(self, key: str) -> bytes:
        with self.server.client() as client, client.get_object(BUCKET, key) as answer:
            return bytes(answer.read())

    def write(self, key: str, data: bytes) -> None:
        with self.server.client() as client:
            client.put_object(BUCKET, key, io.BytesIO(data), len(data))

    def delete(self, *keys: str) -> None:
        with self.server.client() as client:
            for key in keys:
                client.remove_object(BUCKET, key)

    def list(self) -> list[str]:
        """All objects below the prefix."""
        with self.server.client() as client:
            found = client.list_objects(BUCKET, prefix=f"{self.prefix}/", recursive=True)
            return sorted(entry.object_name for entry in found if entry.object_name)

    def uploads(self, *more: str) -> list[str]:
        """Keys of multipart uploads under way; MinIO lists them by their exact key only."""
        with self.server.client() as client:
            names = [f"{self.prefix}/", *self.keys, *more]
            pages = [client._list_multipart_uploads(BUCKET, prefix=name) for name in names]
        return sorted({upload.object_name for page in pages for upload in page.uploads})

    async def assert_served_in_full(self, store: KVStore) -> None:
        served = await serve(store, self.kv)
        assert (served.tokens, served.error) == (len(TOKENS), None), served

    def assert_in_time(self, served: Served, store: KVStore) -> None:
        """P4: lookup and load are two requests deep, and no request outlives its deadline."""
        assert served.seconds < 2 * store.settings.request_deadline_s + MARGIN_S * self.patience


def assert_quiet(records: list[logging.LogRecord], server: LocalServer, *, most: int = 3) -> None:
    """P5: few lines, none of them twice, no secrets."""
    lines = [record.getMessage() for record in records if record.name.startswith("kvstore_s3")]
    text = "\n".join(lines)
    for secret in (server.secret_key, "AKIASHOWN", "Signature", "Credential="):
        assert secret not in text
    repeated = {line: count for line, count in Counter(lines).items() if count > 1}
    assert not repeated, f"said more than once: {repeated}"
    assert len(lines) <= most, text


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
