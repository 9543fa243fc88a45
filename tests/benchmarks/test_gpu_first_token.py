"""Time to the first token on the kernels' emulation: figures mean nothing there, but hits are real and are checked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from device.emulated import ON_DEVICE, build

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_first_token
from gpu_first_token import TINY_LENGTHS, Bench, Prompt, emulate, fingerprint, measure
from gpu_machine import Budget
from gpu_models import TINY, Answer, PlainEngine, open_engine

from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET, DeviceDecoder
from kvstore_s3.codec.device.library import Library
from kvstore_s3.device_save import LayersMemory
from kvstore_s3.runtime import SyncKVStore

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="KVSTORE_S3_CUDA=1: this is about the emulation")
HOST = torch.device("cpu")


@pytest.fixture(scope="module")
def library(pytestconfig: pytest.Config) -> Path:
    return build(Path(pytestconfig.cache.mkdir("kernels")))


@pytest.mark.parametrize("plain", [False, True], ids=["transformers", "plain torch"])
def test_every_prompt_is_computed_saved_and_read_from_each_tier(library: Path, tmp_path: Path, plain: bool) -> None:
    if not plain:
        pytest.importorskip("transformers")
    found = emulate(library, plain=plain, directory=tmp_path)
    whats = ["computed", "saved", "in place", "disk", "file", "NVMe", "host"]
    assert [(row["tokens"], row["what"]) for row in found["rows"]] == [
        (tokens, what) for tokens in TINY_LENGTHS for what in whats
    ]
    assert all(row["milliseconds"] > 0 for row in found["rows"])
    assert [row["loaded_tokens"] for row in found["rows"] if row["what"] == "host"] == [64, 128]
    assert found["engine"].startswith("plain" if plain else "transformers")
    assert found["left_out"] == []
    assert list(tmp_path.iterdir()) == []


def open_bench(decoder: DeviceDecoder, folder: Path, seconds: float = 60) -> Bench:
    return Bench(open_engine(TINY, HOST, decoder, plain=True), TINY, HOST, decoder, folder, Budget(seconds))


def test_a_hit_that_is_not_what_was_saved_does_not_pass(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = SyncKVStore.load

    def spoil(*args: object, **options: object) -> torch.Tensor:
        kv = load(*args, **options)
        kv.view(torch.int16)[1, 1, 17, 1, 3] ^= 1
        return kv

    monkeypatch.setattr(SyncKVStore, "load", spoil)
    with DeviceDecoder(Library(library, emulated=True), HOST, SMALLEST_BUDGET) as decoder:
        rows = Prompt(open_bench(decoder, tmp_path), 96, tmp_path).rows()
        with pytest.raises(AssertionError, match="what came from file is not what was saved"):
            list(rows)


def test_a_hit_that_was_computed_instead_does_not_pass(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(engine: PlainEngine, _: SyncKVStore) -> object:
        return engine.compute

    monkeypatch.setattr(PlainEngine, "reader", compute)
    with DeviceDecoder(Library(library, emulated=True), HOST, SMALLEST_BUDGET) as decoder:
        rows = Prompt(open_bench(decoder, tmp_path), 96, tmp_path).rows()
        with pytest.raises(AssertionError, match="0 of 64 tokens were loaded from file"):
            list(rows)


def test_prompts_that_time_or_memory_is_not_left_for_are_named(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PlainEngine.compute

    def refuse(engine: PlainEngine, prompt: torch.Tensor) -> Answer:
        if len(prompt) == 160:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(engine, prompt)

    monkeypatch.setattr(PlainEngine, "compute", refuse)
    kept: dict[str, Any] = {}
    with DeviceDecoder(Library(library, emulated=True), HOST, SMALLEST_BUDGET) as decoder:
        measure(open_bench(decoder, tmp_path), (160, 32 * 10**9), kept.update)
        assert kept["left_out"][0] == "first token after 160 tokens: the GPU's memory does not hold it"
        assert kept["left_out"][1].startswith("first token after 32000000000 tokens: ")
        measure(open_bench(decoder, tmp_path, seconds=0), (96,), kept.update)
    assert kept["left_out"] == ["first token after 96 tokens: 0 of 0 s are left"]
    assert kept["rows"] == []


def test_prompts_whose_files_have_no_room_are_named(library: Path, tmp_path: Path) -> None:
    with DeviceDecoder(Library(library, emulated=True), HOST, SMALLEST_BUDGET) as decoder:
        bench = open_bench(decoder, tmp_path)
        assert not bench._has_room("that", 10**13)
        assert bench._has_room("this", 96)
    assert len(bench.budget.left_out) == 1
    assert "of files have no room below" in bench.budget.left_out[0]


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


def test_figures_join_those_of_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    (tmp_path / "gpu-x.json").write_text('{"benchmark": "gpu-x", "codec": [1]}')
    gpu_first_token.add_to_record("gpu-x", {"first_token": {"rows": []}})
    gpu_first_token.add_to_record("gpu-y", {"first_token": {"rows": []}})
    assert '"codec": [\n    1\n  ]' in (tmp_path / "gpu-x.json").read_text()
    assert '"first_token"' in (tmp_path / "gpu-x.json").read_text()
    assert '"benchmark": "gpu-y"' in (tmp_path / "gpu-y.json").read_text()
