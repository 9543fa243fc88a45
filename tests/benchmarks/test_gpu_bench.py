"""The GPU benchmark on the kernels' emulation: figures mean nothing there, but every row is computed and checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device.emulated import ON_DEVICE, build

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_tasks
from gpu_bench import CHUNKS, Bench, measure
from gpu_cases import MODELS, TINY, PagedCache, Sections
from gpu_compare import PRODUCTS, SUMS, Expected, Near
from gpu_decoding import LosslessDecoding
from gpu_encoding import LosslessEncoding
from gpu_journal import Journal
from gpu_machine import Budget
from gpu_occupancy import Multiprocessor, describe_occupancy, occupancy
from gpu_path import OverlappedPath
from gpu_product import ProductPath, ranges_of
from gpu_scalable import LossyDecoding, LossySections, draw_lossy
from gpu_scalable_encoding import LossyEncoding
from gpu_share import SHARES
from gpu_tasks import Case, Task, Tasks, Where

from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET, DeviceDecoder
from kvstore_s3.codec.device.library import Library

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="KVSTORE_S3_CUDA=1: this is about the emulation")
HOST = torch.device("cpu")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
VERBS = ("decode", "encode")
LOSSY = ("near-lossless", "balanced", "small", "uncalibrated")


@pytest.fixture(scope="module")
def library(pytestconfig: pytest.Config) -> Library:
    return Library(build(Path(pytestconfig.cache.mkdir("kernels"))), emulated=True)


@pytest.fixture(scope="module")
def lossless() -> Sections:
    return Sections.draw(TINY, 3)


@pytest.fixture(scope="module", params=[True, False], ids=["calibrated", "uncalibrated"])
def lossy(request: pytest.FixtureRequest) -> LossySections:
    return draw_lossy(TINY, 3, calibrated=request.param)


def tiny_tasks(library: Library, counts: tuple[int, ...] = (1, 2)) -> Tasks:
    return Tasks(Where(library, HOST, {"smallest": SMALLEST_BUDGET}, (8,), 2**20), (TINY,), counts)


def open_bench(journal: Journal, seconds: float = 60) -> Bench:
    return Bench(HOST, Budget(seconds, journal.left_out), journal)


def test_every_row_is_measured_and_checked(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(tmp_path / "found.json", {"gpu": {}})
    assert measure(open_bench(journal), tiny_tasks(library), journal) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    rows = [(row["profile"], row["verb"], row["chunks"]) for row in found["codec"]]
    assert sorted(rows) == sorted(
        (name, verb, chunks) for name in ("lossless", *LOSSY) for verb in VERBS for chunks in (1, 2)
    )
    assert all(row["bf16_gb_s"] > 0 for row in found["codec"])
    assert all(row["sections_compared"] == 2 * row["chunks"] for row in found["codec"])
    assert found["slab_to_block"][0]["share_of_copy"] > 0
    products = found["product_path"]
    assert [(row["profile"], row["device_buffer_bytes"]) for row in products] == [
        ("lossless", SMALLEST_BUDGET),
        ("near-lossless", SMALLEST_BUDGET),
    ]
    assert all(row["share_of_copy"] > 0 for row in products)
    assert found["limits"]["scatter_gb_s_out"] is None
    assert found["limits"]["device_copy_gb_s"] > 0
    beside = found["beside_an_engine"]
    assert [(row["share"], row["multiprocessors"]) for row in beside] == list(zip(SHARES, (2, 1, 1, 1), strict=True))
    assert all(row["slowdown"] > 0 and row["decode_gb_s_beside"] > 0 for row in beside)
    assert (found["failed"], found["left_out"]) == ([], [])
    assert not {"begun", "under_way"} & set(found)
    printed = capsys.readouterr().out
    assert "slab to block" in printed
    assert "decoding on 10% of the multiprocessors, a step of 8 tokens" in printed


def test_models_of_other_depths_share_sections_and_not_their_calibration(library: Library) -> None:
    models = TINY, replace(TINY, name="deeper", layers=2 * TINY.layers)
    tasks = Tasks(Where(library, HOST, {"smallest": SMALLEST_BUDGET}, (8,), 2**20), models, (1,))
    journal = Journal(None, {})
    few = [task for task in tasks if task.what.startswith("the product's path, near-lossless")]
    assert measure(open_bench(journal), few, journal) == 0
    assert [row["model"] for row in journal.document["product_path"]] == ["tiny", "deeper"]


def test_the_rows_that_matter_most_come_first(library: Library) -> None:
    where = Where(library, torch.device("cuda"), {"default": 2**27, "512 MiB": 2**29}, (64, 2048), 2**30)
    tasks = list(Tasks(where, MODELS, CHUNKS))
    whats = [task.what for task in tasks]
    assert len(whats) == len(set(whats))
    assert whats[:12] == [
        "copies",
        "values for lossless",
        "lossless decode, 8B, 64 chunks",
        "slab to block, 8B, 64 chunks",
        "slab to block, 8B, 16 chunks",
        "the product's path, lossless, 8B, 64 chunks, device_buffer_bytes default",
        "the product's path, lossless, 8B, 64 chunks, device_buffer_bytes 512 MiB",
        "values for near-lossless",
        "near-lossless decode, 8B, 64 chunks",
        "lossless encode, 8B, 64 chunks",
        "near-lossless encode, 8B, 64 chunks",
        "the product's path, near-lossless, 8B, 64 chunks, device_buffer_bytes default",
    ]
    assert set(whats) >= {
        f"{name} {verb}, {model.name}, {chunks} chunks"
        for name in ("lossless", *LOSSY)
        for verb in VERBS
        for model in MODELS
        for chunks in (1, 4, 16, 64, 256, 512)
    }
    assert len([task for task in tasks if task.name == "beside_an_engine"]) == 8
    codec = [task for task in tasks if task.name == "codec"]
    beyond = {task.what for task in codec if task.needed > 74e9}  # of an H100's 84 GB, with a tenth left over
    assert beyond == {
        "lossless encode, 70B, 512 chunks",
        *(f"{name} decode, 70B, 512 chunks" for name in LOSSY),
        *(f"{name} encode, 8B, 512 chunks" for name in LOSSY),
        *(f"{name} encode, 70B, {chunks} chunks" for name in LOSSY for chunks in (256, 512)),
    }


def fail(*_: object) -> dict[str, Any]:
    raise AssertionError("3 of 4 sections came out wrong")


def test_a_row_that_fails_is_kept_as_failed_and_the_others_go_on(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_tasks, "measure_path", fail)
    monkeypatch.setattr(LosslessEncoding, "check", fail)
    journal = Journal(None, {})
    few = [task for task in tiny_tasks(library, (1,)) if "lossless" in task.what or "slab" in task.what]
    assert measure(open_bench(journal), few, journal) == 1
    assert [row["what"] for row in journal.failed] == [
        "slab to block, tiny, 1 chunks",
        "lossless encode, tiny, 1 chunks",
    ]
    assert [row["why"] for row in journal.failed] == [
        "AssertionError: 3 of 4 sections came out wrong",
        "WrongRowError: 3 of 4 sections came out wrong",
    ]
    assert journal.failed[1]["wrong_row"]["milliseconds"] > 0
    assert [(row["profile"], row["verb"]) for row in journal.document["codec"]] == [
        ("lossless", "decode"),
        ("near-lossless", "decode"),
        ("near-lossless", "encode"),
    ]
    assert len(journal.document["product_path"]) == 2
    assert "FAILED: slab to block, tiny, 1 chunks: AssertionError: 3 of 4" in capsys.readouterr().out


def test_what_the_gpus_memory_does_not_hold_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80e9, 84e9))
    journal = Journal(None, {"codec": []})
    bench = Bench(torch.device("cuda"), Budget(60, journal.left_out), journal)
    ran = []

    def run() -> dict[str, Any]:
        ran.append(True)
        raise torch.OutOfMemoryError("CUDA out of memory")

    bench.run(Task("lossless encode, 70B, 512 chunks", "codec", run, needed=134e9))
    assert not ran
    bench.run(Task("lossless encode, 8B, 512 chunks", "codec", run, needed=54e9))
    assert ran
    assert journal.failed == []
    assert journal.left_out == [
        "lossless encode, 70B, 512 chunks: it takes 134 GB of the GPU's memory, and 80 are free",
        "lossless encode, 8B, 512 chunks: the GPU's memory does not hold it",
    ]


def test_a_task_that_would_not_end_in_time_by_one_before_it_is_left_out() -> None:
    journal = Journal(None, {})
    bench = open_bench(journal, 1e6)
    task = Task("first", "", dict, pace="encode", size=1)
    bench.run(task)
    bench.run(replace(task, what="second", size=1e18))
    assert len(journal.left_out) == 1
    assert journal.left_out[0].startswith("second: ")


@pytest.mark.kernels
def test_a_benchmark_that_is_killed_leaves_the_rows_so_far(library: Library, tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "gpu_bench.py", "--emulation", library.path, "--results", tmp_path]
    places = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    given = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True, env=given) as running:
        assert running.stdout is not None
        while "encode" not in (line := running.stdout.readline()):
            assert line, "the benchmark ended by itself"
        running.send_signal(signal.SIGKILL)
        rest = running.stdout.read()  # ends when nobody can write any more: the measuring process is gone, too
    assert running.returncode == -signal.SIGKILL
    assert "uncalibrated" not in rest
    found = json.loads((tmp_path / "gpu-emulation.json").read_text())
    rows = [(row["profile"], row["verb"]) for row in found["codec"]]
    assert rows[:3] == [("lossless", "decode"), ("near-lossless", "decode"), ("lossless", "encode")]
    assert len(rows) < 20
    assert found["limits"]["host_to_device_gb_s"] > 0
    assert found["slab_to_block"]
    assert found["failed"] == []
    assert found["machine"]["torch"]


def damage(cache: PagedCache) -> None:
    """One value of the middle chunk of three, layer group 1."""
    cache.values[1, 0, cache.table[1], 3, 1, 7] += 1000


def assert_damage_is_seen(run: Callable[[], object], check: Callable[[], None], spoil: Callable[[], None]) -> None:
    run()
    check()
    spoil()
    with pytest.raises(AssertionError, match="1 of 6 sections came out wrong, such as chunk 1, layer group 1"):
        check()


def test_a_wrong_value_in_the_middle_does_not_pass(library: Library, lossless: Sections) -> None:
    cache = PagedCache(TINY, 3, HOST)
    case = LosslessDecoding(library, lossless, 3, cache, HOST)
    assert_damage_is_seen(lambda: case.run(0), case.check, lambda: damage(cache))


def test_a_wrong_lossy_value_in_the_middle_does_not_pass(library: Library, lossy: LossySections) -> None:
    cache = PagedCache(TINY, 3, HOST)
    case = LossyDecoding(library, lossy, 2, 3, cache, HOST)
    assert_damage_is_seen(lambda: case.run(0), case.check, lambda: damage(cache))


def test_a_wrong_value_behind_the_overlapped_path_does_not_pass(library: Library, lossless: Sections) -> None:
    path = OverlappedPath(lossless, 3, HOST)
    assert_damage_is_seen(lambda: path.run(library), path.check, lambda: damage(path.cache))


@pytest.mark.parametrize("profile", ["lossless", "near-lossless"])
def test_a_wrong_value_behind_the_products_path_does_not_pass(
    library: Library, lossless: Sections, profile: str
) -> None:
    stored = lossless if profile == "lossless" else draw_lossy(TINY, 3, calibrated=True)
    cache = PagedCache(TINY, 3, HOST)
    with DeviceDecoder(library, HOST, SMALLEST_BUDGET) as decoder:
        path = ProductPath(decoder, stored, 3, cache)
        cache.spoil()
        assert_damage_is_seen(path.decode, path.check, lambda: damage(cache))
        path.close()


def test_a_wrong_byte_of_a_payload_in_the_middle_does_not_pass(library: Library, lossless: Sections) -> None:
    case = LosslessEncoding(library, lossless, 3, PagedCache(TINY, 3, HOST), HOST)
    assert_damage_is_seen(lambda: case.run(0), case.check, lambda: flip(case, 4))


def test_a_wrong_byte_of_a_lossy_payload_in_the_middle_does_not_pass(library: Library, lossy: LossySections) -> None:
    case = LossyEncoding(library, lossy, 2, 3, PagedCache(TINY, 3, HOST), HOST)
    assert_damage_is_seen(lambda: case.run(0), case.check, lambda: flip(case, 4))


def flip(case: LosslessEncoding | LossyEncoding, section: int) -> None:
    case._payloads.view(6, -1)[section, 100] ^= 1


def test_a_length_that_is_off_does_not_pass(library: Library, lossless: Sections) -> None:
    case = LosslessEncoding(library, lossless, 3, PagedCache(TINY, 3, HOST), HOST)
    case.run(0)
    case._lengths.view(6, -1)[4, 1] -= 2
    with pytest.raises(AssertionError, match="1 of 6 sections came out wrong, such as chunk 1, layer group 1"):
        case.check()


def test_what_was_not_written_does_not_pass(library: Library, lossless: Sections, lossy: LossySections) -> None:
    def cache() -> PagedCache:
        return PagedCache(TINY, 2, HOST)

    cases: list[Case] = [
        LosslessDecoding(library, lossless, 2, cache(), HOST),
        LosslessEncoding(library, lossless, 2, cache(), HOST),
        LossyDecoding(library, lossy, 1, 2, cache(), HOST),
        LossyEncoding(library, lossy, 1, 2, cache(), HOST),
    ]
    for case in cases:
        case.run(0)
        case.check()
        case.spoil()
        with pytest.raises(AssertionError, match=r"did not decode|has no lengths"):
            case.check()


@pytest.mark.parametrize(
    ("near", "moved", "passes"),
    [
        (None, 0.0, True),
        (None, 2.0**-9, False),
        (PRODUCTS, 2.0**-11, True),
        (PRODUCTS, 2.0**-9, False),
        (SUMS, 2.0**-9, False),
    ],
)
def test_values_may_be_off_by_what_the_format_allows(near: Near | None, moved: float, passes: bool) -> None:
    values = draw_lossy(TINY, 1, calibrated=False).values[0]
    cache = PagedCache(replace(TINY, layers=1), 1, HOST)
    wanted = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    few = torch.arange(wanted.numel()).view(wanted.shape) % 5 == 0
    largest = wanted.float().abs().max()
    cache.put(0, range(1), torch.where(few, wanted.float() + moved * largest, wanted.float()).bfloat16()[None])
    expected = Expected([values], near)
    if passes:
        expected.check(cache, replace(TINY, layers=1), 1)
    else:
        with pytest.raises(AssertionError, match="1 of 1 sections came out wrong"):
            expected.check(cache, replace(TINY, layers=1), 1)


def test_values_of_which_too_many_differ_do_not_pass() -> None:
    values = draw_lossy(TINY, 1, calibrated=False).values[0]
    cache = PagedCache(replace(TINY, layers=1), 1, HOST)
    cache.put(0, range(1), torch.from_numpy(values.view(np.int16) + np.int16(1)).view(torch.bfloat16)[None])
    with pytest.raises(AssertionError, match="1 of 1 sections came out wrong"):
        Expected([values], PRODUCTS).check(cache, replace(TINY, layers=1), 1)


def test_a_damaged_stream_does_not_pass(library: Library) -> None:
    sections = Sections.draw(TINY, 1)
    head = sections.payloads[0]
    damaged = head[: 4 * TINY.heads] + b"\x07" + head[4 * TINY.heads + 1 :]
    wrong = Sections(TINY, sections.values, [damaged])
    case = LosslessDecoding(library, wrong, 1, PagedCache(TINY, 1, HOST), HOST)
    case.run(0)
    with pytest.raises(AssertionError, match="2 of 4 heads did not decode"):
        case.check()


def test_sections_that_were_coded_otherwise_do_not_pass(library: Library, lossy: LossySections) -> None:
    values = [value + np.uint16(1 << 7) for value in lossy.values]  # an exponent more
    other = LossyEncoding(library, replace(lossy, values=values), 3, 2, PagedCache(TINY, 2, HOST), HOST)
    other.run(0)
    other._sections = lossy
    with pytest.raises(AssertionError, match=r"values . are off by|4 of 4 sections came out wrong"):
        other.check()


def test_sections_are_read_in_ranges() -> None:
    assert list(ranges_of([3, 3, 3, 9, 1], 8)) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
    assert list(ranges_of([3], 1)) == [range(1)]


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
