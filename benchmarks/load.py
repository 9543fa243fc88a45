"""A hit from the store, beside a raw tensor file of the same KV and the bare reading of our own bytes, in one run.

    python benchmarks/load.py [--store file|minio] [--rounds 9]

KV of 1,792 tokens of a 16-layer model (4 KV heads of 64, bf16): 29.4 MB. The peer is what one would write by hand,
safetensors of the raw KV on the same file system, read back into memory of its own. The limit reads our objects one
after the other into a buffer and does nothing with them. Wall-clock times, best of the rounds; two cores if there are.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from record import record
from safetensors.torch import load as parse_tensors
from safetensors.torch import save_file

from kvstore_s3 import KVLayout, Namespace, connect
from kvstore_s3.config import Settings
from kvstore_s3.runtime import SyncKVStore

LAYOUT = KVLayout(layers=16, kv_heads=4, head_dim=64, dtype="bfloat16")
TOKENS = list(range(1800))
FORGETFUL = Settings(verdict_lifetime_s=1e-6)
"""So that each lookup asks the store."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", choices=["file", "minio"], default="file")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url, settings = open_server(stack) if arguments.store == "minio" else (folder.as_uri(), FORGETFUL)
        result = measure(url, settings, folder, arguments.rounds)
    for name, value in result.items():
        print(f"{name:32} {value}")
    record(f"load-{arguments.store}", {"store": arguments.store, **result}, "torch", "safetensors", "aiobotocore")


def open_server(stack: ExitStack) -> tuple[str, Settings]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from minio_server import BUCKET, running_minio

    server = stack.enter_context(running_minio())
    os.environ.update(server.environment())
    return f"s3://{BUCKET}/bench", FORGETFUL.model_copy(update={"endpoint_url": server.endpoint})


def measure(url: str, settings: Settings, folder: Path, rounds: int) -> dict[str, Any]:
    namespace = Namespace(model="bench", revision="1", layout=LAYOUT)
    kv = realistic_kv()
    with connect(url, namespace, settings) as store:
        started = time.perf_counter()
        saved = store.save(TOKENS, kv)
        save_s = time.perf_counter() - started
        assert torch.equal(store.load(store.lookup(TOKENS)), kv[:, :, :1792])
        lookup_s = best(lambda: store.lookup(TOKENS), rounds)
        hit_s = best(lambda: store.load(store.lookup(TOKENS)), rounds)
        limit_s = best(lambda: read_bare(store), rounds)
    raw = folder / "raw.safetensors"
    save_file({"kv": kv[:, :, :1792].contiguous()}, raw)
    peer_s = best(lambda: parse_tensors(raw.read_bytes())["kv"].clone(), rounds)
    size = LAYOUT.bytes_per_token * 1792
    return {
        "kv_bytes": size,
        "stored_bytes": saved.bytes,
        "bits_per_value": round(16 * saved.bytes / size, 3),
        "save_ms": round(save_s * 1e3, 1),
        "lookup_ms": round(lookup_s * 1e3, 2),
        "hit_ms": round(hit_s * 1e3, 1),
        "hit_gb_s": round(size / hit_s / 1e9, 3),
        "read_bare_ms": round(limit_s * 1e3, 1),
        "raw_safetensors_file_ms": round(peer_s * 1e3, 1),
        "hit_over_read_bare": round(hit_s / limit_s, 2),
        "hit_over_raw_file": round(hit_s / peer_s, 2),
    }


def realistic_kv() -> torch.Tensor:
    """Normal values, each channel with a scale and a mean of its own, as trained models have them."""
    generator = torch.Generator().manual_seed(0)
    shape = (LAYOUT.layers, 2, 1, LAYOUT.kv_heads, LAYOUT.head_dim)
    scale = torch.exp2(torch.rand(shape, generator=generator) * 6 - 3)
    mean = torch.randn(shape, generator=generator)
    values = torch.randn((LAYOUT.layers, 2, len(TOKENS), *shape[3:]), generator=generator)
    return ((values + mean) * scale).bfloat16()


def read_bare(store: SyncKVStore) -> None:
    async def read() -> None:
        for chunk in (await store.kv.lookup(TOKENS)).chunks:
            await store.kv.objects.get_range(chunk.object_key, 0, memoryview(bytearray(chunk.table.object_length)))

    store.runtime.run(asyncio.wait_for(read(), 60))


def best(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main()
