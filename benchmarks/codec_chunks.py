"""Whole chunks through the codecs: GB/s of bf16 per core, and what a second thread brings.

    python benchmarks/codec_chunks.py

A chunk is 256 tokens of a model of 32 layers and 8 KV heads of 128 (34 MB), normal values of many scales and means.
Encoding makes the object that a save would upload; decoding verifies its checksums and fills the KV. "near-lossless"
is without a calibration: channel mode, a step for each layer and component. One thread is timed in its own CPU time,
several by the wall, against as many threads copying memory.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from codec_lossless import normal_kv
from record import record

from kvstore_s3 import KVLayout
from kvstore_s3.bitstream import Identity, parse_header
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.encode import Encoding, encode_object, view_bits
from kvstore_s3.load import decode_section
from kvstore_s3.quality import QUALITIES

LAYOUT = KVLayout(32, 8, 128, "bfloat16", rope={"rope_type": "default", "rope_theta": 500000})
TOKENS, FIRST, CHUNKS, ROUNDS = 256, 2560, 4, 9
IDENTITY = Identity(bytes(32), bytes(32), LAYOUT.full_shard, LAYOUT, TOKENS)


def make_chunk() -> torch.Tensor:
    bits = np.tile(normal_kv()[:, :, :TOKENS], (4, 1, 1, 1, 1))
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def decode_object(data: bytearray, levels: int, out: torch.Tensor) -> None:
    header = parse_header(data, IDENTITY, profiles=("lossless", "scalable"), calibrations=None)
    target = view_bits(out)
    places: dict[int, list[int]] = {}
    for number, section in enumerate(header.table.sections):
        if section.level < levels:
            places.setdefault(section.layer_begin, []).append(number)
    for begin, numbers in places.items():
        sections = [header.table.sections[number] for number in numbers]
        payloads = [
            header.verify(number, memoryview(data)[section.offset : section.end])
            for number, section in zip(numbers, sections, strict=True)
        ]
        decode_section(header, numbers, payloads, target[begin : sections[0].layer_end], FIRST, None)


def cpu_seconds(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.thread_time()
        work()
        best = min(best, time.thread_time() - begin)
    return best


def wall_seconds(work: Callable[[int], object], threads: int) -> float:
    """Of CHUNKS pieces of work."""
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            list(pool.map(work, range(CHUNKS)))
            best = min(best, time.perf_counter() - begin)
    return best


def measure(name: str, kv: torch.Tensor) -> dict[str, Any]:
    quality = QUALITIES[name]
    encoding = Encoding(quality, 4, Rotation.from_layout(LAYOUT))
    size = kv.nbytes
    data, table = encode_object(IDENTITY, kv, encoding, FIRST)
    read = table.header_length + sum(part.stored_length for part in table.sections if part.level < quality.levels)
    outs = [torch.empty_like(kv) for _ in range(CHUNKS)]

    def encode(_: int = 0) -> None:
        encode_object(IDENTITY, kv, encoding, FIRST)

    def decode(index: int = 0) -> None:
        decode_object(data, quality.levels, outs[index])

    found: dict[str, Any] = {
        "bits_per_value": 16 * read / size,
        "encode_gb_s_per_core": size / cpu_seconds(encode) / 1e9,
        "decode_gb_s_per_core": size / cpu_seconds(decode) / 1e9,
    }
    for verb, work in (("encode", encode), ("decode", decode)):
        found[f"{verb}_two_threads"] = wall_seconds(work, 1) / wall_seconds(work, 2)
        tracemalloc.start()
        work(0)
        found[f"{verb}_peak_mb"] = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
    return found


def measure_copy(kv: torch.Tensor) -> dict[str, float]:
    source = view_bits(kv)
    targets = [np.empty_like(source) for _ in range(CHUNKS)]

    def copy(index: int = 0) -> None:
        np.copyto(targets[index], source)

    return {
        "gb_s_per_core": kv.nbytes / cpu_seconds(copy) / 1e9,
        "two_threads": wall_seconds(copy, 1) / wall_seconds(copy, 2),
    }


def main() -> None:
    torch.set_num_threads(1)
    kv = make_chunk()
    results: dict[str, Any] = {name: measure(name, kv) for name in ("lossless", "near-lossless", "small")}
    results["memcpy"] = copy = measure_copy(kv)
    print(
        f"chunk of {kv.nbytes / 1e6:.0f} MB; memcpy {copy['gb_s_per_core']:.1f} GB/s, x{copy['two_threads']:.2f} on two"
    )
    print(f"{'':16}{'bits/value':>11}{'encode GB/s':>13}{'on two':>8}{'decode GB/s':>13}{'on two':>8}{'peak MB':>9}")
    for name in ("lossless", "near-lossless", "small"):
        found = results[name]
        print(
            f"{name:16}{found['bits_per_value']:11.3f}{found['encode_gb_s_per_core']:13.3f}"
            f"{found['encode_two_threads']:8.2f}{found['decode_gb_s_per_core']:13.3f}{found['decode_two_threads']:8.2f}"
            f"{max(found['encode_peak_mb'], found['decode_peak_mb']):9.0f}"
        )
    record("codec_chunks", {"results": results})


if __name__ == "__main__":
    main()
