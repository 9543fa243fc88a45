"""Entropy coders on the same symbols, one core: our rANS beside htscodecs' rANS 32x16 and torchac.

    python benchmarks/entropy.py

G symbols per second of the calling thread's CPU time, the best of several rounds. The row loops of the scalable
codec's base level and htscodecs (Debian, Ubuntu: libhtscodecs-dev) are linked into one program, entropy_peer.cpp, built
here with the system's C++ compiler (CXX). htscodecs counts its symbols and sends their frequencies; our tables are
constants. torchac (PyPI torchac, ninja; it builds itself at its first import) and the whole codecs are called from
Python: the scalable one takes and gives float32, the lossless one bfloat16.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record

from kvstore_s3 import _native
from kvstore_s3.codec.tables import uncalibrated_tables

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
SOURCES = [
    "scalable_tables.cpp",
    *(f"cpu/{name}.cpp" for name in ("decode_rows", "decode_rows_avx2", "decode_rows_avx512")),
]
LOOPS = [f"cpu/scalable_{way}_{name}.cpp" for way in ("decode", "encode") for name in ("rows", "avx2", "avx512")]
ROUNDS = 7


def build_peer(folder: Path) -> Path | None:
    """The program, or None where there is no compiler or no htscodecs, which is said."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        print("htscodecs: skipped, there is no C++ compiler (set CXX)")
        return None
    probe = subprocess.run(
        [compiler, "-x", "c++", "-E", "-"],
        input="#include <htscodecs/rANS_static4x16.h>",
        capture_output=True,
        text=True,
    )
    if probe.returncode != 0:
        print("htscodecs: skipped, its headers are not installed (Debian, Ubuntu: apt install libhtscodecs-dev)")
        return None
    program = folder / "entropy_peer"
    flags = ["-std=c++20", "-O3", "-DNDEBUG", "-ffp-contract=off", "-w"]
    sources = [HERE / "entropy_peer.cpp", *(CSRC / name for name in SOURCES + LOOPS)]
    subprocess.run([compiler, *flags, *map(str, sources), "-lhtscodecs", "-o", str(program)], check=True)
    return program


def measure_loops() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        program = build_peer(Path(folder))
        if program is None:
            return []
        answer = subprocess.run([program], check=True, capture_output=True, text=True)
    return json.loads(answer.stdout)


def seconds(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.thread_time()
        work()
        best = min(best, time.thread_time() - begin)
    return best


def speeds(count: int, size: int, encode: Callable[[], object], decode: Callable[[], object]) -> dict[str, float]:
    return {
        "bits": 8 * size / count,
        "encode_gsym_s": count / seconds(encode) / 1e9,
        "decode_gsym_s": count / seconds(decode) / 1e9,
    }


def measure_scalable(deviation: float) -> dict[str, dict[str, float]]:
    """Base level of the whole codec on a chunk of normal values of that deviation in base steps, by implementation."""
    rng = np.random.Generator(np.random.PCG64(3))
    y = rng.normal(0, 9 * deviation, (256, 1024)).astype(np.float32)
    classes = np.full(1024, round(13 + 4 * np.log2(9 * deviation)), np.uint8)
    tables = uncalibrated_tables().native
    out = np.empty_like(y)
    found = {}
    for name in _native.implementations():
        states, words, escapes = _native.scalable_encode(tables, classes, y, levels=1, implementation=name)

        def encode(name: str = name) -> object:
            return _native.scalable_encode(tables, classes, y, levels=1, implementation=name)

        def decode(states: bytes = states, words: Any = words, escapes: bytes = escapes, name: str = name) -> None:
            fault = _native.scalable_decode(
                tables, classes, states, words, escapes, out, object_levels=1, implementation=name
            )
            assert fault == 0

        size = len(states) + len(words[0]) + len(escapes)
        found[f"scalable codec {name}"] = speeds(y.size, size, encode, decode)
    return found


def measure_lossless() -> dict[str, dict[str, float]]:
    """The whole lossless codec on normal bfloat16 values: nine or ten bits of each are coded or stored."""
    rng = np.random.Generator(np.random.PCG64(3))
    values = rng.standard_normal((4, 2, 256, 1, 128), np.float32)
    bits = np.ascontiguousarray((values.view(np.uint32) >> 16).astype(np.uint16))
    out = np.empty_like(bits)
    found = {}
    for name in _native.implementations():
        payload = memoryview(_native.lossless_encode(bits, implementation=name))

        def encode(name: str = name) -> object:
            return _native.lossless_encode(bits, implementation=name)

        def decode(payload: memoryview = payload, name: str = name) -> None:
            assert _native.lossless_decode(payload, out, head_begin=0, section_heads=1, implementation=name) == 0

        found[f"lossless codec {name}"] = speeds(bits.size, payload.nbytes, encode, decode)
    return found


def measure_torchac(deviation: float) -> dict[str, dict[str, float]]:
    try:
        import torchac
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"torchac: skipped, it cannot be imported (pip install torchac ninja; a C++ compiler): {error}")
        return {}
    count, offset = 1 << 18, 32
    generator = torch.Generator().manual_seed(3)
    numbers = (torch.randn(count, generator=generator) * deviation).round().clamp(-offset, offset - 1)
    symbols = (numbers + offset).to(torch.int16)
    edges = torch.arange(2 * offset + 1) - offset - 0.5
    cdf = torch.distributions.Normal(0.0, deviation).cdf(edges)
    cdf[0], cdf[-1] = 0.0, 1.0
    cdfs = cdf.repeat(count, 1)
    payload = torchac.encode_float_cdf(cdfs, symbols)
    assert torch.equal(torchac.decode_float_cdf(cdfs, payload), symbols)
    found = speeds(
        count,
        len(payload),
        lambda: torchac.encode_float_cdf(cdfs, symbols),
        lambda: torchac.decode_float_cdf(cdfs, payload),
    )
    return {"torchac": found}


def report(name: str, coders: dict[str, dict[str, float]]) -> None:
    print(f"\n{name}\n{'':26}{'bits/symbol':>12}{'encode G/s':>12}{'decode G/s':>12}")
    for coder, found in coders.items():
        print(f"{coder:26}{found['bits']:12.3f}{found['encode_gsym_s']:12.4f}{found['decode_gsym_s']:12.4f}")


def ratios_to_peer(coders: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Ours by htscodecs' AVX2 loop."""
    peer = coders.get("htscodecs 32x16 avx2")
    if peer is None:
        return {}
    return {
        name: {way: found[f"{way}_gsym_s"] / peer[f"{way}_gsym_s"] for way in ("encode", "decode")}
        for name, found in coders.items()
        if name.startswith("ours")
    }


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for stream in measure_loops():
        name = f"{stream['shape']}, {stream['entropy']:.2f} bits, row loops"
        results[name] = {"coders": stream["coders"], "to_htscodecs_avx2": ratios_to_peer(stream["coders"])}
        report(name, stream["coders"])
        for coder, ratio in results[name]["to_htscodecs_avx2"].items():
            print(f"{coder}: {ratio['encode']:.2f} x htscodecs' AVX2 encode, {ratio['decode']:.2f} x its decode")
    whole = {
        "Gauss, deviation 1, whole codecs": {**measure_scalable(1.0), **measure_lossless(), **measure_torchac(1.0)},
        "Gauss, deviation 4, whole codecs": {**measure_scalable(4.0), **measure_torchac(4.0)},
    }
    for name, coders in whole.items():
        results[name] = {"coders": coders}
        report(name, coders)
    record("entropy", {"results": results}, "numpy", "torch")


if __name__ == "__main__":
    main()
