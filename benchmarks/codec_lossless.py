"""Bits per value and speed per core of the lossless codec, beside memcpy and zstd in the same run.

    python benchmarks/codec_lossless.py [--assets DIR]

Sections are those of the store: 256 tokens, groups of 4 layers; the KV of the models in DIR/models (default: the
environment's KVSTORE_S3_TEST_ASSETS, else ../shared) and normal values in the shape of a larger model. Speeds are GB
of bf16 per second of the calling thread's CPU time, the best of several rounds, so that other load counts little.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import zstandard
from record import record

from kvstore_s3 import _native
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.lossless import LosslessCodec

CHUNK, GROUP, ROUNDS = 256, 4, 7
ROOT = Path(__file__).parent.parent


def cut_sections(kv: Bits) -> list[Bits]:
    return [
        np.ascontiguousarray(kv[layer : layer + GROUP, :, token : token + CHUNK])
        for token in range(0, kv.shape[2] // CHUNK * CHUNK, CHUNK)
        for layer in range(0, kv.shape[0], GROUP)
    ]


def normal_kv() -> Bits:
    """8 layers of 8 heads of 128, of many scales and means."""
    rng = np.random.Generator(np.random.PCG64(1))
    scale = 2.0 ** rng.uniform(-3, 3, (8, 2, 1, 8, 128)).astype(np.float32)
    values = rng.standard_normal((8, 2, 512, 8, 128), np.float32)
    values += rng.exponential(0.7, scale.shape).astype(np.float32)
    return ((values * scale).view(np.uint32) >> 16).astype(np.uint16)


def model_kv(folder: Path, token_ids: list[int]) -> Bits:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        cache = model(torch.tensor([token_ids]), use_cache=True).past_key_values
    layers = [torch.stack([layer.keys[0], layer.values[0]]).transpose(1, 2) for layer in cache.layers]
    return torch.stack(layers).to(torch.bfloat16).contiguous().view(torch.uint16).numpy()


def sources(assets: Path) -> Iterator[tuple[str, Bits]]:
    yield "normal values, 8 heads of 128", normal_kv()
    models = assets / "models"
    if (models / "books8M").is_dir():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(models / "books8M" / "tokenizer.json"))
        for text in sorted((assets / "text").glob("*.txt")):
            token_ids = tokenizer.encode(text.read_text()[:12_000]).ids[:1536]
            yield f"books8M, {text.name}", model_kv(models / "books8M", token_ids)
    if (models / "stories260K").is_dir():
        token_ids = np.random.Generator(np.random.PCG64(5)).integers(3, 512, 512).tolist()
        yield "stories260K, random tokens", model_kv(models / "stories260K", token_ids)


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this thread, the best of several rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.thread_time()
        work()
        best = min(best, time.thread_time() - begin)
    return best


def measure_codec(codec: LosslessCodec, sections: list[Bits]) -> dict[str, float]:
    size = sum(section.nbytes for section in sections)
    payloads = [codec.encode(section) for section in sections]
    targets = [np.empty_like(section) for section in sections]

    def encode() -> None:
        for section in sections:
            codec.encode(section)

    def decode() -> None:
        for payload, target in zip(payloads, targets, strict=True):
            codec.decode(memoryview(payload), target, head_begin=0, section_heads=target.shape[3])

    speeds = {"encode_gb_s": size / seconds(encode) / 1e9, "decode_gb_s": size / seconds(decode) / 1e9}
    assert all(map(np.array_equal, sections, targets))
    return {"bits_per_value": 16 * sum(map(len, payloads)) / size, **speeds}


def measure_zstd(sections: list[Bits]) -> dict[str, float]:
    size = sum(section.nbytes for section in sections)
    compressor, decompressor = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    raw = [section.tobytes() for section in sections]
    frames = [compressor.compress(octets) for octets in raw]
    return {
        "bits_per_value": 16 * sum(map(len, frames)) / size,
        "encode_gb_s": size / seconds(lambda: [compressor.compress(octets) for octets in raw]) / 1e9,
        "decode_gb_s": size / seconds(lambda: [decompressor.decompress(frame) for frame in frames]) / 1e9,
    }


def measure_copy(sections: list[Bits]) -> dict[str, float]:
    size = sum(section.nbytes for section in sections)
    targets = [np.empty_like(section) for section in sections]
    speed = size / seconds(lambda: [np.copyto(*pair) for pair in zip(targets, sections, strict=True)]) / 1e9
    return {"bits_per_value": 16.0, "encode_gb_s": speed, "decode_gb_s": speed}


def measure(kv: Bits) -> dict[str, dict[str, float]]:
    sections = cut_sections(kv)
    methods = {f"lossless {name}": measure_codec(LosslessCodec(name), sections) for name in _native.implementations()}
    return {**methods, "zstd 3 on raw": measure_zstd(sections), "memcpy": measure_copy(sections)}


def report(name: str, methods: dict[str, dict[str, float]]) -> None:
    copy = methods["memcpy"]["decode_gb_s"]
    print(f"\n{name}\n{'':20}{'bits/value':>11}{'encode GB/s':>13}{'decode GB/s':>13}{'of memcpy':>11}")
    for method, found in methods.items():
        print(
            f"{method:20}{found['bits_per_value']:11.3f}{found['encode_gb_s']:13.3f}"
            f"{found['decode_gb_s']:13.3f}{found['decode_gb_s'] / copy:11.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("KVSTORE_S3_TEST_ASSETS", ROOT.parent / "shared")
    parser.add_argument("--assets", type=Path, default=default, help="folder with models/ and text/")
    arguments = parser.parse_args()
    results = {}
    for name, kv in sources(arguments.assets):
        results[name] = measure(kv)
        report(name, results[name])
    record("codec_lossless", {"results": results}, "zstandard")


if __name__ == "__main__":
    main()
