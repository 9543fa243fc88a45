"""Write tests/golden/cachegen: run it when a payload is added. What is there already must never change.

python tests/codec/write_cachegen_golden.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.cachegen import CacheGenCodec, from_float
from kvstore_s3.codec.raw import RawCodec

FOLDER = Path(__file__).parent.parent / "golden" / "cachegen"


def draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Values that drift from token to token, with scales and means of their own in each channel."""
    rng = np.random.Generator(np.random.PCG64(seed))
    layers, kinds, _, heads, dim = shape
    scale = 2.0 ** rng.uniform(-3, 3, (layers, kinds, 1, heads, dim))
    drift = rng.normal(size=shape).cumsum(axis=2) / 4
    return ((rng.normal(size=shape) / 2 + drift + rng.normal(size=scale.shape)) * scale).astype(np.float32)


def goldens() -> Iterator[tuple[str, CacheGenCodec, Bits]]:
    values = np.array([1.0, -0.5, 1.25, -0.5, 0.5, -0.5], np.float32).reshape(1, 1, 3, 1, 2)
    yield "example", CacheGenCodec("float32", ((4,),)), values.view(np.uint32)
    bfloat16 = CacheGenCodec("bfloat16", ((32, 32), (32, 16), (16, 16)))
    yield "bfloat16", bfloat16, from_float(draw((3, 2, 48, 2, 8), 1), "bfloat16")
    yield "float16", CacheGenCodec("float16", ((16, 32),)), from_float(draw((1, 2, 31, 3, 5), 2), "float16")
    yield "float32", CacheGenCodec("float32", ((16, 16),)), from_float(draw((1, 2, 40, 1, 8), 3), "float32")
    yield "anchor-alone", CacheGenCodec("bfloat16", ((16, 16),)), from_float(draw((1, 2, 1, 2, 4), 4), "bfloat16")
    largest = np.float32(65504) * np.array([1, -1, 1, -1, 0.5, 0], np.float32).reshape(1, 1, 2, 1, 3)
    yield "largest-float16", CacheGenCodec("float16", ((4,),)), from_float(largest, "float16")


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    index = {}
    for name, codec, values in goldens():
        payload = codec.encode(values)
        decoded = np.empty_like(values)
        codec.decode(memoryview(payload), decoded, head_begin=0, section_heads=values.shape[3])
        (FOLDER / f"{name}.payload").write_bytes(payload)
        (FOLDER / f"{name}.values").write_bytes(RawCodec().encode(values))
        (FOLDER / f"{name}.decoded").write_bytes(RawCodec().encode(decoded))
        index[name] = {"dtype": codec.dtype, "shape": list(values.shape), "bins": codec.bins}
        print(f"{name}: {values.nbytes} bytes to {len(payload)}")
    (FOLDER / "index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
