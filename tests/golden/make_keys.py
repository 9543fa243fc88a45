"""Writes tests/golden/keys.json anew. Run it only to add cases: a changed value is a changed format.

python tests/golden/make_keys.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvstore_s3.hashing import chunk_keys, root_key
from kvstore_s3.namespace import Namespace

GOLDEN = Path(__file__).with_name("keys.json")

LAYOUT = {"layers": 2, "kv_heads": 2, "head_dim": 64, "dtype": "bfloat16", "attention": "full"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TINY = {
    "format": 1,
    "model": "LlamaForCausalLM",
    "revision": "0123abc",
    "layout": {**LAYOUT, "rope": {"rope_type": "default", "rope_theta": 10000.0}},
    "chunk_tokens": 16,
    "lora": None,
    "variant": None,
}
LARGE = {
    **TINY,
    "model": "acme/modèle-8b",
    "layout": {
        **LAYOUT,
        "layers": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "rope": {**LLAMA3, "partial_rotary_factor": 0.3},
    },
    "chunk_tokens": 256,
    "lora": "weights:ab",
    "variant": "awq",
}
NO_ROPE = {**TINY, "layout": {**LAYOUT, "dtype": "float16", "rope": {"rope_type": "none"}}}

SMALL_IDS = {"first": 0, "step": 1, "count": 33}
LARGE_IDS = {"first": 4294967295, "step": 4294963201, "count": 600}

CASES: list[dict[str, Any]] = [
    {"name": "no salt", "namespace": TINY, "tokens": SMALL_IDS},
    {"name": "salt", "namespace": TINY, "salt_hex": b"tenant-a".hex(), "tokens": SMALL_IDS},
    {"name": "empty salt", "namespace": TINY, "salt_hex": "", "tokens": SMALL_IDS},
    {"name": "salt beyond ASCII", "namespace": TINY, "salt_hex": "clé".encode().hex(), "tokens": SMALL_IDS},
    {"name": "extra key", "namespace": TINY, "tokens": SMALL_IDS, "extra_hex": {"1": "a1" * 32}},
    {"name": "no whole chunk", "namespace": TINY, "tokens": {"first": 7, "step": 0, "count": 15}},
    {"name": "no rope", "namespace": NO_ROPE, "tokens": SMALL_IDS},
    {"name": "large", "namespace": LARGE, "salt_hex": b"tenant-a".hex(), "tokens": LARGE_IDS},
]


def expand_tokens(tokens: dict[str, int]) -> list[int]:
    """Return the ids of a case: first + i * step, modulo 2^32."""
    return [(tokens["first"] + index * tokens["step"]) % 2**32 for index in range(tokens["count"])]


def compute_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return a case with everything that is pinned: the canonical JSON, the namespace, the root, the chunk keys."""
    namespace = Namespace.from_json(json.dumps(case["namespace"]))
    salt = bytes.fromhex(case["salt_hex"]) if "salt_hex" in case else None
    extra = {int(index): bytes.fromhex(value) for index, value in case.get("extra_hex", {}).items()}
    root = root_key(namespace.digest, salt)
    keys = chunk_keys(root, expand_tokens(case["tokens"]), namespace.chunk_tokens, extra_keys=extra)
    pinned = {"namespace_json": namespace.to_json(), "namespace_hex": namespace.hex, "root": root.hex()}
    return {**case, **pinned, "keys": [key.hex() for key in keys]}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps([compute_case(case) for case in CASES], indent=1) + "\n", encoding="ascii")
