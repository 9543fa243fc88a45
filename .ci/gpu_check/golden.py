"""Golden payloads of codec 1 by the GPU library alone: torch and Python's own library, no numpy and no stand-in.

    python golden.py LIBRARY [--emulated] [--measure]

Each is decoded and encoded, and compared with the stored bytes. With `--measure`, instead, 64 chunks of an 8B model are
decoded into paged blocks, and GB/s of bf16 printed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import struct
import sys
from collections.abc import Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).resolve().parent.parent.parent / "tests" / "golden" / "codec"
DECODE_JOB, ENCODE_JOB = struct.Struct("<QIIIIHBBI"), struct.Struct("<QQIIIIIIHBBI")
PAGES = struct.Struct("<QQIIqqq")
"""KvsLosslessJob, KvsLosslessEncodeJob and KvsPages of csrc/cuda/api.h."""
SECTION = (4, 2, 256, 8, 128)
"""Of an 8B: layers, K and V, tokens, heads, dims."""
CHUNKS, GROUPS, DISTINCT, BLOCK = 64, 8, 23, 16
ROUNDS = 7

Shape = Sequence[int]


class Memory:
    """Bytes where the kernels run."""

    def __init__(self, data: bytes | bytearray, device: torch.device) -> None:
        self.tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
        self.address = self.tensor.data_ptr()

    def read(self) -> bytes:
        host = self.tensor.cpu()
        return ctypes.string_at(host.data_ptr(), host.numel())


class Bench:
    def __init__(self, library: Path, device: torch.device) -> None:
        self.library, self.device = ctypes.CDLL(str(library)), device
        self.library.kvs_lossless_encode_scratch.restype = ctypes.c_uint64

    def put(self, data: bytes | bytearray) -> Memory:
        return Memory(data, self.device)

    def call(self, name: str, jobs: Memory, count: int, pages: bytes, answers: Memory) -> list[int]:
        address = ctypes.c_void_p
        pages_of_host = ctypes.create_string_buffer(pages, len(pages))
        function = getattr(self.library, name)
        fault = function(address(jobs.address), count, pages_of_host, address(answers.address), address(0))
        if fault:
            raise RuntimeError(f"{name} failed with CUDA error {fault}")
        return list(struct.unpack(f"<{count}I", answers.read()))

    def lay_out(self, values: Memory, shape: Shape) -> tuple[Memory, bytes]:
        """The section as one block: its planes, which the pages name, and the pages."""
        layers, kinds, tokens, heads, dim = shape
        plane = 2 * tokens * heads * dim
        addresses = [
            values.address + (layer * kinds + min(kind, kinds - 1)) * plane
            for layer in range(layers)
            for kind in (0, 1)
        ]
        planes = self.put(struct.pack(f"<{len(addresses)}Q", *addresses))
        return planes, PAGES.pack(planes.address, 0, 1, dim, 0, heads * dim, dim)

    def decode(self, payload: bytes, shape: Shape) -> bytes:
        layers, kinds, tokens, heads, _ = shape
        values, staged = self.put(bytes(2 * prod(shape))), self.put(payload)
        planes, pages = self.lay_out(values, shape)
        streams = streams_of(payload, heads)
        jobs = [
            DECODE_JOB.pack(staged.address + begin, length, tokens, 0, 0, layers, 0, kinds, head)
            for head, (begin, length) in enumerate(streams)
        ]
        faults = self.call("kvs_lossless_decode", self.put(b"".join(jobs)), heads, pages, self.put(b"\xff" * 4 * heads))
        if any(faults):
            raise AssertionError(f"faults {faults}")
        del planes
        return values.read()

    def encode(self, values: bytes, shape: Shape) -> bytes:
        layers, kinds, tokens, heads, dim = shape
        given = self.put(values)
        planes, pages = self.lay_out(given, shape)
        room = self.put(bytes(heads * (8 + 2 * layers * kinds * dim * tokens)))
        size = self.library.kvs_lossless_encode_scratch(ctypes.c_uint64(layers * kinds * dim), ctypes.c_uint64(tokens))
        size = -(-size // 16) * 16
        scratch = self.put(bytes(heads * size))
        jobs = [
            ENCODE_JOB.pack(
                *(room.address, scratch.address + head * size, tokens, 0, 0, head, heads, head, layers, 0, kinds, 0)
            )
            for head in range(heads)
        ]
        lengths = self.call("kvs_lossless_encode", self.put(b"".join(jobs)), heads, pages, self.put(bytes(4 * heads)))
        del planes
        return room.read()[: 4 * heads + sum(lengths)]

    def measure(self) -> float:
        """GB/s of bf16 out, the median."""
        from kvstore_s3 import _native

        layers, kinds, tokens, heads, dim = SECTION
        generator = torch.Generator().manual_seed(1)
        drawn = [torch.randn(SECTION, generator=generator).to(torch.bfloat16) for _ in range(DISTINCT)]
        payloads = [_native.lossless_encode(view_bits(section)) for section in drawn]
        staged = [self.put(payload) for payload in payloads]
        blocks, row = CHUNKS * tokens // BLOCK, heads * dim
        cache = torch.empty(GROUPS * layers, 2, blocks, BLOCK, row, dtype=torch.bfloat16, device=self.device)
        table = torch.randperm(blocks, generator=generator, dtype=torch.int32).to(self.device)
        steps = torch.arange(2 * GROUPS * layers, dtype=torch.int64) * blocks * BLOCK * row * 2
        planes = (cache.data_ptr() + steps).to(self.device)
        pages = PAGES.pack(planes.data_ptr(), table.data_ptr(), BLOCK, dim, BLOCK * row, row, dim)
        jobs = [
            DECODE_JOB.pack(
                *(staged[pick].address + begin, length, tokens, chunk * tokens, group * layers, layers, 0, kinds, head)
            )
            for group in range(GROUPS)
            for chunk in range(CHUNKS)
            for pick in [(chunk * GROUPS + group) % DISTINCT]
            for head, (begin, length) in enumerate(streams_of(payloads[pick], heads))
        ]
        queued, answers = self.put(b"".join(jobs)), self.put(b"\xff" * 4 * len(jobs))
        if any(self.call("kvs_lossless_decode", queued, len(jobs), pages, answers)):
            raise AssertionError("a head did not decode")
        places = table[(CHUNKS - 1) * tokens // BLOCK :].long()
        found = cache[(GROUPS - 1) * layers :, :, places].reshape(SECTION).cpu()
        expected = drawn[((CHUNKS - 1) * GROUPS + GROUPS - 1) % DISTINCT]
        if not torch.equal(found.view(torch.int16), expected.view(torch.int16)):
            raise AssertionError("the last chunk came out wrong")
        return cache.numel() * 2 / self.median_seconds(queued, len(jobs), pages, answers) / 1e9

    def median_seconds(self, jobs: Memory, count: int, pages: bytes, answers: Memory) -> float:
        times = []
        for _ in range(ROUNDS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self.library.kvs_lossless_decode(
                ctypes.c_void_p(jobs.address), count, pages, ctypes.c_void_p(answers.address), ctypes.c_void_p(0)
            )
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return sorted(times)[ROUNDS // 2]


def streams_of(payload: bytes, heads: int) -> list[tuple[int, int]]:
    """Begin and length of each head's stream."""
    lengths = struct.unpack(f"<{heads}I", payload[: 4 * heads])
    return list(zip(accumulate(lengths, initial=4 * heads), lengths, strict=False))


def view_bits(section: torch.Tensor) -> memoryview:
    """uint16 of the section's shape, without numpy."""
    data = ctypes.string_at(section.data_ptr(), 2 * section.numel())
    return memoryview(data).cast("H", list(section.shape))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    bench = Bench(options.library, torch.device("cpu" if options.emulated else "cuda"))
    if options.measure:
        print(json.dumps({"lossless_decode_gb_s": bench.measure()}))
        return 0
    return check(bench)


def check(bench: Bench) -> int:
    """1 where a payload does not decode or encode to what is stored, else 0."""
    shapes: dict[str, Any] = json.loads((GOLDEN / "index.json").read_text())
    names = [name for name, what in shapes.items() if what["codec"] == 1]
    wrong = []
    for name in names:
        payload, values = ((GOLDEN / f"{name}.{kind}").read_bytes() for kind in ("payload", "values"))
        shape = shapes[name]["shape"]
        sound = bench.decode(payload, shape) == values, bench.encode(values, shape) == payload
        print(f"{name}: decodes {'right' if sound[0] else 'WRONG'}, encodes {'right' if sound[1] else 'WRONG'}")
        wrong += [] if all(sound) else [name]
    print(json.dumps({"golden": len(names), "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
