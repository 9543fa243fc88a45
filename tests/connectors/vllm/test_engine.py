"""The connector in a real vLLM on the CPU. Each test starts engines, each in a process of its own."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

Prompt = list[int]


def prompt_of(length: int, *, seed: int, shared: int = 0) -> Prompt:
    """Token ids; the first `shared` are the same for every seed."""
    return [(i * 131 + (0 if i < shared else seed) * 977 + i**2 % 89) % 1000 for i in range(length)]


FIRST = prompt_of(700, seed=1)
ALIGNED = prompt_of(512, seed=2)
"""All of it is whole chunks: a hit covers the whole prompt, and the engine computes its last token again."""
SHORT = prompt_of(200, seed=3)
SHARING = [prompt_of(900, seed=seed, shared=600) for seed in (4, 5, 6)]


@pytest.fixture(scope="module")
def plain(run_engine: Any) -> Any:
    """Without a connector: what all others must give."""
    return run_engine([[FIRST], [ALIGNED], [SHORT], SHARING])


@pytest.fixture(scope="module")
def warmed(run_engine: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A file store, and the engine of three processes that filled it and then ended."""
    directory = tmp_path_factory.mktemp("store")
    return directory, run_engine([[FIRST], [ALIGNED], [SHORT]], store=f"file://{directory}", processes=True)


def objects_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("l0-4.h0-4") if path.is_file())


def objects_of(prompt: Prompt, directory: Path) -> list[Path]:
    """The objects of a prompt's chunks, in order."""
    from kvstore_s3.hashing import chunk_keys, root_key

    namespace = next(directory.rglob("namespace.json")).parent
    keys = chunk_keys(root_key(bytes.fromhex(namespace.name), None), prompt, 256)
    return [namespace / key.hex() / "l0-4.h0-4" for key in keys]


def test_an_engine_that_saves_gives_the_same_tokens_and_stores_each_chunk(plain: Any, warmed: tuple[Path, Any]):
    directory, first = warmed
    assert first.tokens == plain.tokens[:3]
    assert first.cached == [[0], [0], [0]]
    assert len(objects_in(directory)) == 4, "two chunks of each long prompt, also if the engine ends at once"


def test_another_engine_reads_the_prompts_from_the_store(plain: Any, warmed: tuple[Path, Any], run_engine: Any):
    second = run_engine([[FIRST], [ALIGNED], [SHORT]], store=f"file://{warmed[0]}", processes=True)
    assert second.tokens == plain.tokens[:3]
    assert second.cached == [[512], [512], [0]]
    assert second.count("external_prefix_cache_hits") == 1024
    assert second.count("kvstore_tokens_loaded") == 1024
    assert second.count("kvstore_loads_failed") == 0
    assert second.count("kvstore_tokens_saved") == 0, "what is there is not written again"


def test_damage_is_computed_instead_and_mended(plain: Any, warmed: tuple[Path, Any], run_engine: Any, tmp_path: Path):
    shutil.copytree(warmed[0], tmp_path / "store")
    # One object each: of several, a load may end at the first before it has met the others.
    for path in (objects_of(FIRST, tmp_path / "store")[0], objects_of(ALIGNED, tmp_path / "store")[1]):
        path.write_bytes(path.read_bytes()[:-64] + bytes(64))
    # The engine's own prefix cache is off, so that every round asks the store; SHORT gives the last save time to end.
    run = run_engine(
        [[FIRST], [SHORT], [FIRST], [ALIGNED], [SHORT], [SHORT]],
        store=f"file://{tmp_path}/store",
        enable_prefix_caching=False,
    )
    first, aligned, short = (plain.tokens[number] for number in range(3))
    assert run.tokens == [first, short, first, aligned, short, short]
    assert run.cached[0] == [0]
    assert run.cached[2] == [512], "mended by the engine that computed it"
    assert run.count("kvstore_loads_failed") == 2
    assert run.count("kvstore_tokens_loaded") == 0 + 512 + 256, "of ALIGNED, what lies before the damage"
    assert run.count("kvstore_tokens_saved") == 256 + 256
    assert len(run.log_lines("Recovered from KV load failure")) == 2, "vLLM computes instead, whatever its policy was"


def test_a_lossy_profile_is_saved_and_loaded_and_said(plain: Any, run_engine: Any, tmp_path: Path):
    options = {
        "store": f"file://{tmp_path}/store",
        "extra": {"profile": "near-lossless"},
        "enable_prefix_caching": False,
    }
    saving = run_engine([[FIRST]], **options)  # its end waits for the save
    assert saving.tokens[0] == plain.tokens[0], "nothing was loaded for the first"
    run = run_engine([[FIRST]], **options)
    assert run.cached == [[512]]
    assert run.count("kvstore_tokens_loaded") == 512
    assert run.count("kvstore_loads_failed") == 0
    assert len(run.log_lines("near-lossless (uncalibrated)")) >= 1
    size = sum(path.stat().st_size for path in objects_in(tmp_path))
    assert size < 512 * 4 * 2 * 4 * 64 * 8 / 8, "fewer than 8 bits a value"


def test_a_store_that_refuses_connections_changes_nothing_but_one_line(plain: Any, run_engine: Any):
    refused = run_engine(
        [[FIRST], [ALIGNED], [SHORT], SHARING],
        store="s3://bucket/prefix",
        environment={
            "KVSTORE_S3_ENDPOINT_URL": f"http://127.0.0.1:{closed_port()}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "never-shown",
            "AWS_EC2_METADATA_DISABLED": "true",
        },
    )
    assert refused.tokens == plain.tokens
    assert len(refused.log_lines("computed without the KV store")) == 1
    assert "never-shown" not in refused.log
    assert refused.count("kvstore_saves") == refused.count("kvstore_loads") == 0


def test_a_store_that_never_answers_delays_one_request_by_the_deadline(plain: Any, run_engine: Any):
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        run = run_engine(
            [[FIRST], [ALIGNED], [SHORT], SHARING],
            store="s3://bucket/prefix",
            extra={"lookup_deadline_s": 0.5, "flush_s": 0.1},
            environment={
                "KVSTORE_S3_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
                "AWS_ACCESS_KEY_ID": "nobody",
                "AWS_SECRET_ACCESS_KEY": "never-shown",
            },
        )
    assert run.tokens == plain.tokens
    assert len(run.log_lines("computed without the KV store")) == 1
    assert run.count("kvstore_lookups") == 1, "after the first late answer nobody asks"


def test_chunked_prefill_preemption_and_salts(run_engine: Any, tmp_path: Path):
    """One engine with little room: prefill in pieces of 192 tokens, requests that share a prefix, and preemptions.

    In float32, because in bfloat16 vLLM's own tokens depend on which requests happen to share a step.
    """
    salted = [{"prompt_token_ids": SHARING[0], "cache_salt": "tenant"}]
    rounds = [SHARING, SHARING, salted, salted]
    limits = {"dtype": "float32", "max_num_batched_tokens": 192, "num_gpu_blocks_override": 19, "max_model_len": 1280}
    alone = run_engine(rounds, max_tokens=200, **limits)
    run = run_engine(rounds, store=f"file://{tmp_path}", max_tokens=200, **limits)
    assert run.count("num_preemptions") > 0
    assert run.tokens == alone.tokens
    assert run.tokens[2] == run.tokens[0][:1]
    assert run.cached[2] == [0], "another tenant's KV is not used"
    distinct_chunks = 2 + 3 + 3  # the shared two, each prompt's third, and the salted prompt's three
    assert len(list(tmp_path.rglob("l0-4.h0-4"))) == distinct_chunks
    assert run.count("kvstore_tokens_saved") == distinct_chunks * 256, "no chunk is written twice"


def test_a_request_aborted_while_loading_gives_its_blocks_back(plain: Any, warmed: tuple[Path, Any], run_engine: Any):
    run = run_engine([[FIRST], [ALIGNED]], store=f"file://{warmed[0]}", scenario="abort_while_loading")
    assert run.result["held"] == 4, "512 tokens in blocks of 128 are held while the load may write into them"
    assert run.result["lost"] == 0
    assert run.result["steps"] > 0
    assert run.tokens == plain.tokens[:2]
    assert run.cached == [[512], [512]]


def test_what_transformers_computed_is_read_by_vllm(
    plain: Any, warmed: tuple[Path, Any], run_engine: Any, llama: Path, tmp_path: Path
):
    import torch
    from transformers import AutoModelForCausalLM

    from kvstore_s3 import Namespace, connect

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    with torch.no_grad():
        layers = model(torch.tensor([FIRST]), use_cache=True).past_key_values.layers
    kv = torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in layers]).transpose(2, 3).contiguous()
    namespace = Namespace.from_model(llama, dtype=torch.bfloat16)
    with connect(f"file://{tmp_path}", namespace) as store:
        assert store.save(FIRST, kv).chunks_new == 2
    with connect(f"file://{warmed[0]}", namespace) as store:  # vLLM's own, under the same namespace
        from_vllm = store.load(store.lookup(FIRST))
    assert_close_in_angle(kv[:, :, :512], from_vllm)
    run = run_engine([[FIRST]], store=f"file://{tmp_path}")
    assert run.cached == [[512]]
    assert run.count("kvstore_tokens_loaded") == 512


def assert_close_in_angle(left: Any, right: Any) -> None:
    """Rounding in another order moves values of random weights a little; a swap or a shift moves them anywhere."""
    from torch.nn.functional import cosine_similarity

    angles = cosine_similarity(left.float(), right.float(), dim=-1)
    assert float(angles.mean()) > 0.999
    assert float(angles[0].min()) > 0.99, "the first layer has met little rounding"


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
