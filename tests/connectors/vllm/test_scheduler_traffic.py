"""vLLM's real scheduler and block manager, random traffic, and a model whose every KV value is known."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

import torch  # noqa: E402
from connectors.vllm.rig import Rig, RigOptions, Shape, tokens  # noqa: E402
from connectors.vllm.rig_store import Faults  # noqa: E402
from connectors.vllm.rig_traffic import Habits, Traffic, check_store  # noqa: E402

BY_LAYER = {"load_mode": "by-layer"}
LONG_ANSWERS = Habits(requests=60, longest=200, answer=100)


@dataclass(frozen=True)
class Case:
    options: RigOptions = field(default_factory=RigOptions)
    habits: Habits = field(default_factory=Habits)
    preempts: bool = False


CASES = {
    "the engine's own prefix cache in front": Case(),
    "every prefix from the store": Case(RigOptions(prefix_caching=False)),
    "room for few": Case(RigOptions(blocks=24)),
    "preemptions": Case(RigOptions(blocks=20, prefix_caching=False), LONG_ANSWERS, preempts=True),
    "preemptions and a prefix cache": Case(RigOptions(blocks=20), LONG_ANSWERS, preempts=True),
    "prefill in small pieces": Case(RigOptions(step_tokens=40)),
    "blocks longer than chunks": Case(RigOptions(Shape(block_tokens=128), blocks=32, prefix_caching=False)),
    "blocks as long as chunks": Case(RigOptions(chunk_tokens=32, prefix_caching=False)),
    "chunks of three blocks": Case(RigOptions(chunk_tokens=96)),
    "float32": Case(RigOptions(Shape(dtype=torch.float32), prefix_caching=False)),
    "loads by layer": Case(RigOptions(extra=BY_LAYER)),
    "loads by layer, each prefix": Case(RigOptions(prefix_caching=False, extra=BY_LAYER)),
    "loads by layer and preemptions": Case(RigOptions(blocks=20, extra=BY_LAYER), LONG_ANSWERS, preempts=True),
    "only what is worth its cost": Case(RigOptions(prefix_caching=False, measured=True)),
    "saved at the second sight": Case(RigOptions(prefix_caching=False, extra={"save_at": 2})),
    "a tier in memory": Case(RigOptions(prefix_caching=False, settings={"HOST_TIER_BYTES": str(1 << 20)})),
}


@pytest.mark.parametrize("name", CASES)
def test_random_traffic_meets_only_right_kv_and_leaves_nothing_behind(name: str):
    case = CASES[name]
    store = "faulty://traffic-" + re.sub(r"[^a-z]", "", name)
    with Rig(store, case.options) as rig:
        traffic = Traffic(rig, case.habits, seed=len(name))
        traffic.run()
        rig.check_nothing_left()
        assert len(rig.finished) + sum(traffic.aborted_in.values()) == len(traffic.prompts)
        assert sum(rig.external.values()) > 0 or case.options.measured, "nothing was loaded: this proves nothing"
        assert rig.counts.get("kvstore_tokens_saved", 0) > 0
        preemptions = sum(asked.request.num_preemptions for asked in rig.finished.values())
        assert bool(preemptions) == case.preempts or not case.preempts
    assert check_store(store, rig.formula, traffic.prompts, chunk_tokens=case.options.chunk_tokens) > 0


def test_what_one_engine_saved_another_loads_from_files(tmp_path: Path):
    prompt = tokens(400)
    for expected in (0, 384):
        with Rig(f"file://{tmp_path}") as rig:
            name = rig.ask(prompt)
            rig.run()
            assert rig.external.get(name, 0) == expected
            rig.check_nothing_left()


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_the_same_prefix_asked_at_once_is_saved_once_and_transferred_once_where_blocks_are_shared(prefix_caching: bool):
    prompt, options = tokens(200), RigOptions(prefix_caching=prefix_caching)
    for engine in ("cold", "warm"):
        with Rig(f"faulty://at-once-{prefix_caching}".lower(), options, Faults(delay_s=(0.01, 0.01))) as rig:
            for _ in range(6):
                rig.ask(prompt)
            rig.run()
            rig.check_nothing_left()
            if engine == "warm":
                assert sum(rig.external.values()) == 192 * (1 if prefix_caching else 6)
        assert rig.faults.chunks_created == (4 if engine == "cold" else 0)


def test_a_conversation_that_grows_saves_only_new_chunks():
    with Rig("faulty://growing", RigOptions(longest=2048)) as rig:
        prompt = tokens(100)
        for turn in range(8):
            name = rig.ask(prompt, answer=20)
            rig.run()
            prompt = prompt + rig.finished[name].tokens + tokens(70, seed=turn)
        rig.run()
        rig.check_nothing_left()
    longest = len(rig.finished[name].request.prompt_token_ids)
    assert rig.faults.calls["put"] == len(rig.faults.created), "nothing is written twice"
    assert rig.faults.chunks_created == longest // 48


def test_salts_share_nothing():
    prompt = tokens(200)
    with Rig("faulty://salted", RigOptions(prefix_caching=False)) as rig:
        for salt in ("one", "two", None):
            rig.ask(prompt, salt=salt)
            rig.run()
        assert rig.external == {}
        for _ in range(20):  # what was computed is being saved
            name = rig.ask(prompt, salt="one")
            rig.run()
            if rig.external:
                break
        assert rig.external == {name: 192}
        rig.check_nothing_left()


def test_prompts_shorter_than_a_chunk_are_left_alone():
    with Rig("faulty://short") as rig:
        for seed in range(20):
            rig.ask(tokens(47, seed=seed))
        rig.run()
        rig.check_nothing_left()
        assert not rig.counts.get("kvstore_lookups")
        assert not rig.faults.created
