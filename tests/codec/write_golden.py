"""Write tests/golden/codec: run it when a payload is added. What is there already must never change.

python tests/codec/write_golden.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvstore_s3.codec.base import Bits, Codec
from kvstore_s3.codec.lossless import LosslessCodec
from kvstore_s3.codec.planes import PlanesCodec
from kvstore_s3.codec.raw import RawCodec

FOLDER = Path(__file__).parent.parent / "golden" / "codec"
SPECIAL = [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7FC1, 0xFFFF, 0x0001, 0x8001, 0x007F, 0x7F7F, 0x0080]


def to_bfloat16(values: np.ndarray) -> Bits:
    """Bit patterns of float32 values, cut off."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Values of many scales and means, different in each component."""
    rng = np.random.Generator(np.random.PCG64(seed))
    layers, kinds, _, heads, dim = shape
    scale = 2.0 ** rng.uniform(-6, 6, (layers, kinds, 1, heads, dim))
    return (rng.normal(size=shape) + rng.normal(size=scale.shape) * 2) * scale


def example() -> Bits:
    values = np.array([[1.0, -2.5], [1.25, -3.0], [0.75, -2.75], [1.5, -2.25]] * 4)
    return to_bfloat16(values.T.reshape(1, 2, 16, 1, 1))


def mixed() -> Bits:
    """Head 0: special values among others. Head 1: random bits, so stored. Head 2: constant."""
    values = to_bfloat16(draw((2, 2, 30, 3, 8), 1))
    rng = np.random.Generator(np.random.PCG64(2))
    values[:, :, 7, 0, :] = rng.choice(np.array(SPECIAL, np.uint16), (2, 2, 8))
    values[:, :, :, 1, :] = rng.integers(0, 65536, values[:, :, :, 1, :].shape)
    values[:, :, :, 2, :] = 0xBF80
    return values


def goldens() -> Iterator[tuple[str, str, Codec, Bits]]:
    lossless = LosslessCodec()
    yield "example", "bfloat16", lossless, example()
    yield "mixed", "bfloat16", lossless, mixed()
    yield "one-block-and-a-part", "bfloat16", lossless, to_bfloat16(draw((1, 2, 70, 2, 20), 3))
    yield "keys-alone", "bfloat16", lossless, to_bfloat16(draw((3, 1, 48, 1, 64), 4))
    yield "odd-dims", "bfloat16", lossless, to_bfloat16(draw((1, 1, 64, 2, 13), 5))
    yield "raw-bfloat16", "bfloat16", RawCodec(), mixed()[:1, :, :3]
    yield "planes-float16", "float16", PlanesCodec(), draw((1, 2, 32, 2, 16), 6).astype(np.float16).view(np.uint16)
    yield "planes-float32", "float32", PlanesCodec(), draw((1, 2, 32, 2, 16), 7).astype(np.float32).view(np.uint32)
    yield "planes-float8", "float8_e4m3fn", PlanesCodec(), (mixed()[:, :, :, :1] >> 8).astype(np.uint8)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    index = {}
    for name, dtype, codec, values in goldens():
        payload = codec.encode(values)
        (FOLDER / f"{name}.payload").write_bytes(payload)
        (FOLDER / f"{name}.values").write_bytes(RawCodec().encode(values))
        index[name] = {"codec": codec.id, "dtype": dtype, "shape": list(values.shape)}
        print(f"{name}: {values.nbytes} bytes to {len(payload)}")
    (FOLDER / "index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
