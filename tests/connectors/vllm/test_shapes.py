"""Engines of other shapes: ranks, dtypes, guessed tokens, adapters, changed weights. Each test starts real engines."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def prompt_of(length: int, *, seed: int) -> list[int]:
    return [(i * 131 + seed * 977 + i**2 % 89) % 1000 for i in range(length)]


PROMPT, OTHER = prompt_of(700, seed=1), prompt_of(600, seed=2)
REPEATING = [(i * 7) % 40 for i in range(700)]

NOBIND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""Two ranks on one NUMA node: vLLM would look for a node for each. They wait for each other spinning, so that with more
threads than cores a step may take ten seconds."""

TWO_RANKS: dict[str, Any] = {"processes": True, "environment": NOBIND, "dtype": "float32", "tensor_parallel_size": 2}
TWO_STAGES: dict[str, Any] = {
    "processes": True,
    "environment": NOBIND | {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{Path(__file__).parent}"},
    "dtype": "float32",
    "pipeline_parallel_size": 2,
    "worker_cls": "pipeline_worker.PipelineWorker",
}


@pytest.fixture(scope="module")
def plain(run_engine: Any) -> Any:
    """One rank without a connector: what all others must give."""
    return run_engine([[PROMPT], [OTHER]], dtype="float32")


@pytest.fixture(scope="module")
def saved(run_engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a store into which one rank saved `PROMPT`. Tests copy it."""
    directory = tmp_path_factory.mktemp("saved")
    run_engine([[PROMPT]], store=f"file://{directory}", dtype="float32")
    return directory


@pytest.fixture
def store(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "store"))


def shards_in(directory: Path) -> set[str]:
    """Names of the objects' shards, without the namespace's own files."""
    return {path.name for path in directory.rglob("l*.h*") if len(path.parent.name) == 64}


@pytest.mark.parametrize(
    ("engine", "parts"),
    [(TWO_RANKS, {"l0-4.h0-2", "l0-4.h2-4"}), (TWO_STAGES, {"l0-2.h0-4", "l2-4.h0-4"})],
    ids=["tensor", "pipeline"],
)
def test_ranks_use_what_one_saved_and_one_uses_what_they_saved(
    plain: Any, run_engine: Any, store: Path, engine: dict[str, Any], parts: set[str]
):
    two = run_engine([[PROMPT], [OTHER]], store=f"file://{store}", **engine)
    assert two.cached == [[512], [0]]
    assert two.tokens == plain.tokens
    assert shards_in(store) == {"l0-4.h0-4", *parts}
    one = run_engine([[OTHER]], store=f"file://{store}", dtype="float32")
    assert one.cached == [[512]]
    assert one.tokens == plain.tokens[1:]


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "kept"),
    [("float16", "auto", "float16"), ("bfloat16", "fp8", "float8_e4m3fn")],
)
def test_tokens_are_the_same_for_every_dtype_of_kv(
    run_engine: Any, tmp_path: Path, dtype: str, kv_dtype: str, kept: str
):
    store, kind = f"file://{tmp_path}/store", {"dtype": dtype, "kv_cache_dtype": kv_dtype}
    first = run_engine([[PROMPT]], store=store, **kind)
    document = json.loads(next(tmp_path.rglob("namespace.json")).read_text())
    assert document["layout"]["dtype"] == kept
    again = run_engine([[PROMPT]], store=store, **kind)
    assert (first.cached, again.cached) == ([[0]], [[512]])
    assert again.tokens == first.tokens


def test_guessed_tokens_do_not_change_what_is_saved_and_loaded(run_engine: Any, tmp_path: Path):
    """The guesses come from the prompt, so a prompt that repeats itself has many of them accepted."""
    guessing = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    engine: dict[str, Any] = {"dtype": "float32", "max_tokens": 24, "store": f"file://{tmp_path}/store"}
    first = run_engine([[REPEATING]], speculative_config=guessing, **engine)
    again = run_engine([[REPEATING]], speculative_config=guessing, **engine)
    without = run_engine([[REPEATING]], **engine)
    assert (first.cached, again.cached, without.cached) == ([[0]], [[512]], [[512]])
    assert again.tokens == first.tokens == without.tokens


def adapter(path: Path, seed: int) -> str:
    """A LoRA adapter of the small Llama's attention, with random weights."""
    weights, random = {}, torch.Generator().manual_seed(seed)
    for layer in range(4):
        for name, width in (("q_proj", 512), ("k_proj", 256), ("v_proj", 256)):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{module}.lora_A.weight"] = torch.randn(8, 256, generator=random) * 0.3
            weights[f"{module}.lora_B.weight"] = torch.randn(width, 8, generator=random) * 0.3
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors")
    names = ["q_proj", "k_proj", "v_proj"]
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": names, "task_type": "CAUSAL_LM"}
    (path / "adapter_config.json").write_text(
        json.dumps({**config, "bias": "none", "base_model_name_or_path": "llama"})
    )
    return str(path)


def test_adapters_are_told_apart_by_content_and_not_by_name(run_engine: Any, tmp_path: Path):
    first, same, other = (adapter(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    engine: dict[str, Any] = {"store": f"file://{tmp_path}/store", "dtype": "float32", "enable_lora": True}

    def asks(name: str, path: str) -> dict[str, Any]:
        return {"prompt_token_ids": PROMPT, "lora": [name, 1, path]}

    saved = run_engine([[asks("tuned", first)], [PROMPT]], **engine)
    renamed = run_engine([[asks("other-name", same)]], **engine)
    replaced = run_engine([[asks("tuned", other)], [PROMPT]], **engine)
    assert saved.cached == [[0], [0]]
    assert renamed.cached == [[512]], "other name, same content"
    assert renamed.tokens == saved.tokens[:1]
    assert replaced.cached == [[0], [512]], "same name, other content; and the model without an adapter is a hit"
    assert replaced.tokens[1] == saved.tokens[1]
    assert len({str(tokens) for tokens in (saved.tokens[0], saved.tokens[1], replaced.tokens[0])}) == 3


def test_nothing_old_is_loaded_after_the_weights_have_changed(
    plain: Any, run_engine: Any, llama: Path, store: Path, tmp_path: Path
):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(12)
    others = tmp_path / "others"
    transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(llama)).save_pretrained(others)
    engine: dict[str, Any] = {"store": f"file://{store}", "dtype": "float32"}
    changed = run_engine(
        [[PROMPT], [PROMPT], [PROMPT], [PROMPT]], scenario="change_weights", job={"others": str(others)}, **engine
    )
    expected = run_engine([[PROMPT]], model=others, dtype="float32")
    assert expected.tokens != plain.tokens[:1]
    assert changed.cached[0] == [512]
    assert changed.tokens[:2] == plain.tokens[:1] * 2, "sleeping changes nothing"
    assert changed.cached[2] == [0], "what the old weights made is not loaded"
    assert changed.tokens[2:] == expected.tokens * 2
    again = run_engine([[PROMPT]], **engine)
    assert again.cached == [[512]]
    assert again.tokens == plain.tokens[:1], "what the new weights made did not take the place of the old"
