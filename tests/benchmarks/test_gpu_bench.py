"""The GPU benchmark on the kernels' emulation: figures mean nothing there, but every row is computed and checked."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device.emulated import ON_DEVICE, build

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu_bench import Bench, measure
from gpu_cases import TINY, LosslessDecoding, PagedCache, Sections
from gpu_encoding import LosslessEncoding
from gpu_machine import Budget
from gpu_occupancy import Multiprocessor, describe_occupancy, occupancy
from gpu_scalable import draw_lossy
from gpu_scalable_encoding import LossyEncoding
from gpu_share import SHARES

from kvstore_s3.codec.device.library import Library

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="KVSTORE_S3_CUDA=1: this is about the emulation")
HOST = torch.device("cpu")
VERBS = ("decode", "encode")


@pytest.fixture(scope="module")
def library(pytestconfig: pytest.Config) -> Library:
    return Library(build(Path(pytestconfig.cache.mkdir("kernels"))), emulated=True)


def test_every_row_is_measured_and_checked(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(Bench(library, HOST, Budget(60)), (TINY,), (1, 2))
    rows = [(row["profile"], row["verb"], row["chunks"]) for row in found["codec"]]
    assert rows == [
        ("lossless", "decode", 1),
        ("lossless", "decode", 2),
        ("lossless", "encode", 1),
        ("lossless", "encode", 2),
        *((name, verb, 1) for name in ("near-lossless", "balanced", "small", "uncalibrated") for verb in VERBS),
    ]
    assert all(row["bf16_gb_s"] > 0 for row in found["codec"])
    assert found["slab_to_block"][0]["share_of_copy"] > 0
    assert found["limits"]["scatter_gb_s_out"] is None
    beside = found["beside_an_engine"]
    assert [(row["share"], row["multiprocessors"]) for row in beside] == list(zip(SHARES, (2, 1, 1, 1), strict=True))
    assert all(row["slowdown"] > 0 and row["decode_gb_s_beside"] > 0 for row in beside)
    printed = capsys.readouterr().out
    assert "slab to block" in printed
    assert "decoding on 10% of the multiprocessors, a step of 8 tokens" in printed


def test_figures_that_were_taken_stay_where_a_later_one_fails(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("chunk 0, layer group 0 came out wrong")

    monkeypatch.setattr("gpu_bench.measure_path", fail)
    found: dict[str, Any] = {}
    with pytest.raises(AssertionError):
        measure(Bench(library, HOST, Budget(60)), (TINY,), (1,), found)
    assert found["codec"]
    assert found["beside_an_engine"]


def test_wrong_values_do_not_pass(library: Library) -> None:
    sections = Sections.draw(TINY, 2)
    cache = PagedCache(TINY, 2, HOST)
    case = LosslessDecoding(sections, 2, cache, HOST)
    case.run(library, 0)
    case.check()
    assert np.array_equal(cache.read(TINY, 1, 0), sections.values[sections.pick(1, 0)])
    cache.values[0, 0, cache.table[0], 3] = 1e30
    with pytest.raises(AssertionError, match="chunk 0, layer group 0 came out wrong"):
        case.check()


def test_a_damaged_stream_does_not_pass(library: Library) -> None:
    sections = Sections.draw(TINY, 1)
    head = sections.payloads[0]
    damaged = head[: 4 * TINY.heads] + b"\x07" + head[4 * TINY.heads + 1 :]
    case = LosslessDecoding(Sections(TINY, sections.values, [damaged]), 1, PagedCache(TINY, 1, HOST), HOST)
    case.run(library, 0)
    with pytest.raises(AssertionError, match="2 heads did not decode"):
        case.check()


@pytest.mark.parametrize("calibrated", [False, True])
def test_sections_that_were_coded_otherwise_do_not_pass(library: Library, calibrated: bool) -> None:
    sections = draw_lossy(TINY, 2, calibrated=calibrated)
    case = LossyEncoding(library, sections, 3, 2, PagedCache(TINY, 2, HOST), HOST)
    case.run(0)
    case.check()
    values = [value + np.uint16(1 << 7) for value in sections.values]  # an exponent more
    other = LossyEncoding(library, replace(sections, values=values), 3, 2, PagedCache(TINY, 2, HOST), HOST)
    other.run(0)
    other._sections = sections
    with pytest.raises(AssertionError, match="values 0 "):
        other.check()


def test_a_lossless_payload_that_is_not_the_cpus_does_not_pass(library: Library) -> None:
    sections = Sections.draw(TINY, 2)
    other = Sections(TINY, sections.values, sections.payloads[::-1])
    case = LosslessEncoding(library, other, 1, PagedCache(TINY, 1, HOST), HOST)
    case.run(0)
    with pytest.raises(AssertionError, match="values 0 were coded otherwise"):
        case.check()


def test_what_time_is_not_left_for_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    budget = Budget(0)
    assert not budget.allows("lossless decode, 8B, 64 chunks")
    assert "lossless decode, 8B, 64 chunks" in capsys.readouterr().out
    assert budget.left_out == ["lossless decode, 8B, 64 chunks: 0 of 0 s are left"]
    assert Budget(60).allows("what takes 5 s", 5)
    assert not Budget(60).allows("what takes 70 s", 70)


@pytest.mark.parametrize(
    ("threads", "shared", "registers", "blocks", "bound"),
    [
        (512, 82494, 64, 2, "registers"),  # 16 warps of 2,048 registers each: as many as there are for two blocks
        (256, 98304, 33, 2, "shared memory"),
        (1024, 0, 32, 2, "registers"),
        (1024, 0, 16, 2, "threads"),
        (32, 0, 16, 32, "blocks"),
        (256, -1, 248, 1, "registers"),
    ],
)
def test_the_scarcest_of_a_multiprocessors_room_bounds_the_blocks_at_once(
    threads: int, shared: int, registers: int, blocks: int, bound: str
) -> None:
    room = Multiprocessor(2048, 32, 228 * 1024)
    found = occupancy(room, threads, shared, {"registers": registers, "spills": 0})
    assert (found["blocks"], found["bound_by"]) == (blocks, bound)
    assert found["occupancy"] == blocks * threads / 2048
    assert found["warps"] == blocks * threads // 32


def test_a_gpu_runs_the_newest_code_that_it_can() -> None:
    codes = [describe_occupancy(capability).get("code") for capability in ("7.5", "8.0", "8.9", "9.0", "10.3")]
    assert codes == [None, "sm_80", "sm_80", "sm_90", "sm_100"]
    kernels = describe_occupancy("9.0")["kernels"]
    assert kernels["LosslessDecode"]["occupancy"] == 0.5
