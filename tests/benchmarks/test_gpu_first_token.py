"""Time to the first token on the kernels' emulation: figures mean nothing there, but hits are real and are checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from device.emulated import ON_DEVICE, build

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_first_token
from gpu_first_token import FIRST_PROMPT, TINY_LENGTHS, EngineError, Prompts, emulate, measure
from gpu_journal import Journal
from gpu_machine import Budget
from gpu_models import TINY, Answer, Engine, PlainEngine, open_engine
from gpu_prompt import Bench, Prompt, fingerprint

from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET, DeviceDecoder
from kvstore_s3.codec.device.library import Library
from kvstore_s3.device_save import LayersMemory
from kvstore_s3.errors import StoreUnavailableError
from kvstore_s3.runtime import SyncKVStore

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="KVSTORE_S3_CUDA=1: this is about the emulation")


@pytest.fixture(scope="module")
def library(pytestconfig: pytest.Config) -> Path:
    return build(Path(pytestconfig.cache.mkdir("kernels")))


WHATS = ["computed", "saved", "in place", "disk", "file", "NVMe", "host"]


@pytest.mark.parametrize("plain", [False, True], ids=["transformers", "plain torch"])
def test_every_prompt_is_computed_saved_and_read_from_each_tier(library: Path, tmp_path: Path, plain: bool) -> None:
    if not plain:
        pytest.importorskip("transformers")
    journal = Journal(None, {})
    assert emulate(library, journal, plain=plain, directory=tmp_path) == 0
    found = journal.document
    assert [(row["tokens"], row["what"]) for row in found["rows"]] == [
        (tokens, what) for tokens in TINY_LENGTHS for what in WHATS
    ]
    assert all(row["milliseconds"] > 0 for row in found["rows"])
    assert [row["loaded_tokens"] for row in found["rows"] if row["what"] == "host"] == [64, 128]
    assert found["engine"].startswith("plain" if plain else "transformers")
    assert found["left_out"] == found["failed"] == []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def bench(library: Path, tmp_path: Path) -> Iterator[Bench]:
    host, journal = torch.device("cpu"), Journal(None, {})
    with DeviceDecoder(Library(library, emulated=True), host, SMALLEST_BUDGET) as decoder:
        engine = open_engine(TINY, host, decoder, plain=True)
        yield Bench(engine, TINY, host, decoder, tmp_path, Budget(60, journal.left_out), journal)


def measure_one(bench: Bench, folder: Path) -> list[str]:
    """What of one prompt has figures."""
    rows: list[dict[str, Any]] = []
    Prompt(bench, 96, folder).measure(rows.append)
    return [row["what"] for row in rows]


def test_a_hit_that_is_not_what_was_saved_does_not_pass(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = SyncKVStore.load

    def spoil(*args: object, **options: object) -> torch.Tensor:
        kv = load(*args, **options)
        kv.view(torch.int16)[1, 1, 17, 1, 3] ^= 1
        return kv

    monkeypatch.setattr(SyncKVStore, "load", spoil)
    assert measure_one(bench, tmp_path) == WHATS[:4]
    first = bench.journal.failed[0]
    assert (first["what"], first["why"]) == (
        "file, 96 tokens",
        "WrongRowError: what came from file is not what was saved",
    )
    assert first["wrong_row"]["milliseconds"] > 0
    assert len(bench.journal.failed) == 3


def test_a_hit_that_was_computed_instead_does_not_pass(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(engine: PlainEngine, _: SyncKVStore) -> object:
        return engine.compute

    monkeypatch.setattr(PlainEngine, "reader", compute)
    assert measure_one(bench, tmp_path) == WHATS[:4]
    whys = [failed["why"] for failed in bench.journal.failed]
    assert whys == [f"WrongRowError: 0 of 64 tokens were loaded from {what}" for what in WHATS[4:]]


def test_a_tier_that_fails_leaves_the_others(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Prompt._fill

    def refuse(prompt: Prompt, store: SyncKVStore) -> None:
        if store.kv.settings.nvme_tier_dir is not None:
            raise StoreUnavailableError("the disk is gone")
        fill(prompt, store)

    monkeypatch.setattr(Prompt, "_fill", refuse)
    assert measure_one(bench, tmp_path) == [what for what in WHATS if what != "NVMe"]
    assert bench.journal.failed == [{"what": "NVMe, 96 tokens", "why": "StoreUnavailableError: the disk is gone"}]


def test_a_length_that_fails_leaves_the_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run = PlainEngine.compute

    def refuse(engine: PlainEngine, prompt: torch.Tensor) -> Answer:
        if len(prompt) == 96:
            raise RuntimeError("no kernel image is available")
        return run(engine, prompt)

    monkeypatch.setattr(PlainEngine, "compute", refuse)
    assert measure(bench, TINY_LENGTHS) == 1
    found = bench.journal.document
    assert [(row["tokens"], row["what"]) for row in found["rows"]] == [(160, what) for what in WHATS]
    assert found["failed"] == [
        {"what": "first token after 96 tokens", "why": "RuntimeError: no kernel image is available"}
    ]


def test_an_engine_that_fails_with_the_first_prompt_measures_nothing(
    bench: Bench,
) -> None:
    class Other:
        name = "transformers 1.0"

        def compute(self, prompt: torch.Tensor) -> Answer:
            raise RuntimeError("expected another mask")

    other = cast("Engine", Other())
    with pytest.raises(EngineError, match="plain torch is tried instead"):
        measure(replace(bench, engine=other), TINY_LENGTHS)
    assert [failed["what"] for failed in bench.journal.failed] == [FIRST_PROMPT]
    assert bench.journal.document["rows"] == []


def test_prompts_that_time_or_memory_is_not_left_for_are_named(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PlainEngine.compute

    def refuse(engine: PlainEngine, prompt: torch.Tensor) -> Answer:
        if len(prompt) == 160:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(engine, prompt)

    monkeypatch.setattr(PlainEngine, "compute", refuse)
    assert measure(bench, (160, 32 * 10**9)) == 0
    left_out = bench.journal.left_out
    assert left_out[0] == "first token after 160 tokens: the GPU's memory does not hold it"
    assert left_out[1].startswith("first token after 32000000000 tokens: ")
    late = Journal(None, {})
    assert measure(replace(bench, budget=Budget(0, late.left_out), journal=late), (96,)) == 0
    assert late.left_out == ["first token after 96 tokens: 0 of 0 s are left"]
    assert late.document["rows"] == []


def test_prompts_whose_files_have_no_room_are_named(bench: Bench) -> None:
    assert not Prompts(bench).has_room("that", 10**13)
    assert Prompts(bench).has_room("this", 96)
    assert len(bench.budget.left_out) == 1
    assert "of files have no room below" in bench.budget.left_out[0]


@pytest.mark.kernels
def test_a_benchmark_that_is_killed_leaves_the_rows_so_far(library: Path, tmp_path: Path) -> None:
    (tmp_path / "gpu-x.json").write_text('{"benchmark": "gpu-x", "codec": [1]}')
    script = Path(gpu_first_token.__file__)
    command = [sys.executable, script, "--emulation", library, "--results", tmp_path, "--name", "gpu-x", "--plain"]
    command += ["--directory", tmp_path / "files"]
    places = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    given = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True, env=given) as running:
        assert running.stdout is not None
        while "in place" not in (line := running.stdout.readline()):
            assert line, "the benchmark ended by itself"
        running.send_signal(signal.SIGKILL)
        running.stdout.read()
    found = json.loads((tmp_path / "gpu-x.json").read_text())
    assert found["codec"] == [1]
    assert [row["what"] for row in found["first_token"]["rows"]][:3] == WHATS[:3]
    assert len(found["first_token"]["rows"]) < 2 * len(WHATS)


def test_the_sum_of_kv_changes_with_each_bit_and_each_place() -> None:
    bits = torch.randint(
        -(2**15), 2**15, (2, 2, 40, 3, 8), dtype=torch.int16, generator=torch.Generator().manual_seed(1)
    )

    def sums(kv: torch.Tensor) -> list[int]:
        return fingerprint(LayersMemory(tuple((layer[0], layer[1]) for layer in kv.view(torch.bfloat16))))

    before = sums(bits)
    assert len(set(before)) == 4
    changed, swapped = bits.clone(), bits.clone()
    changed[1, 0, 39, 2, 7] ^= 1
    swapped[0, 1, [3, 4]] = bits[0, 1, [4, 3]]
    assert [one == other for one, other in zip(before, sums(changed), strict=True)] == [True, True, False, True]
    assert [one == other for one, other in zip(before, sums(swapped), strict=True)] == [True, False, True, True]
