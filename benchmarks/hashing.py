"""Time to hash a long prompt into chunk keys, next to the same chain with SHA-256.

    python benchmarks/hashing.py [--tokens 131072] [--chunk-tokens 256] [--repeat 30]

The peer makes the same chain (parent | tokens as little-endian u32) over an array with hashlib's SHA-256, the digest
that vLLM's prefix cache uses by default, but without vLLM's serialisation, which flatters the peer. Best of `--repeat`
runs, in ms.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from record import record

from kvstore_s3.hashing import TokenArray, chunk_keys, root_key

TARGETS_MS = {"array_u32": 5.0, "list": 20.0}


def main() -> None:
    arguments = parse_arguments()
    ids = np.random.default_rng(1).integers(0, 151936, arguments.tokens, dtype=np.int64)
    root, size = root_key(bytes(32), None), arguments.chunk_tokens
    inputs = {
        "array_u32": ids.astype("<u4"),
        "array_i64": ids,
        "tensor_i64": torch.from_numpy(ids),
        "list": ids.tolist(),
        "tuple": tuple(ids.tolist()),
    }
    times = {
        name: best_ms(lambda value=value: chunk_keys(root, value, size), arguments.repeat)
        for name, value in inputs.items()
    }
    peer = best_ms(lambda: sha256_keys(root, inputs["array_u32"], size), arguments.repeat)
    result = {
        "tokens": arguments.tokens,
        "chunk_tokens": size,
        "unit": "ms, best of repeat",
        "repeat": arguments.repeat,
        "kvstore_s3": times,
        "peer_sha256_array_u32": peer,
        "times_faster_than_peer": round(peer / times["array_u32"], 2),
        "targets": TARGETS_MS,
        "within_targets": all(times[name] <= target for name, target in TARGETS_MS.items()),
    }
    print(json.dumps(result, indent=2))
    record("hashing", result, "blake3", "numpy")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=30)
    return parser.parse_args()


def best_ms(call: Callable[[], object], repeat: int) -> float:
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return round(best * 1000, 3)


def sha256_keys(root: bytes, tokens: TokenArray, size: int) -> list[bytes]:
    content, width, keys, parent = tokens.tobytes(), size * 4, [], root
    for start in range(0, len(content) - width + 1, width):
        parent = hashlib.sha256(parent + content[start : start + width]).digest()
        keys.append(parent)
    return keys


if __name__ == "__main__":
    main()
