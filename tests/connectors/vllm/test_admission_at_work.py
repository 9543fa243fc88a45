"""Admission in vLLM's real scheduler: what it is told, and what follows from its answers."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

from connectors.vllm.rig import Rig, RigOptions, tokens  # noqa: E402
from connectors.vllm.rig_store import Faults  # noqa: E402

PROMPT, CHUNKS = 200, 192


def engine(**extra: object) -> RigOptions:
    """Without a prefix cache of its own: what is not loaded is computed."""
    return RigOptions(prefix_caching=False, extra=dict(extra))


def loaded(rig: Rig, prompt: list[int]) -> int:
    name = rig.ask(prompt)
    rig.run()
    return rig.external.get(name, 0)


def settle(rig: Rig) -> None:
    """Saves go on after their requests."""
    rig.run(until=lambda: not rig.scheduler.connector._scheduler._saves._saves)


def test_at_the_second_sight_a_prompt_is_saved_when_it_comes_again():
    with Rig("faulty://second-sight", engine(save_at=2)) as rig:
        assert loaded(rig, tokens(PROMPT)) == 0
        settle(rig)
        assert rig.counts.get("kvstore_tokens_saved", 0) == 0
        assert loaded(rig, tokens(PROMPT)) == 0, "it was computed again, and saved"
        settle(rig)
        assert loaded(rig, tokens(PROMPT)) == CHUNKS
        assert rig.counts["kvstore_tokens_saved"] == CHUNKS
        rig.check_nothing_left()


def test_at_the_second_sight_only_the_part_that_came_again_is_saved():
    shared = tokens(96)
    with Rig("faulty://shared-beginning", engine(save_at=2)) as rig:
        for seed in range(3):
            loaded(rig, shared + tokens(104, seed=seed + 1))
            settle(rig)
        assert rig.counts["kvstore_tokens_saved"] == 96


@pytest.mark.parametrize(("tokens_per_s", "expected"), [(20, CHUNKS), (1e8, 0)])
def test_a_hit_is_waited_for_by_a_slow_engine_and_not_by_a_fast_one(tokens_per_s: float, expected: int):
    """The store takes 500 ms. Computing takes 10 s or 2 microseconds, of which a quarter may be spent on waiting."""
    store, options = f"faulty://patience-{expected}", engine(admission="cost", prefill_tokens_per_s=tokens_per_s)
    with Rig(store, engine()) as rig:
        loaded(rig, tokens(PROMPT))
        settle(rig)
    with Rig(store, options, Faults(delay_s=(0.5, 0.5))) as rig:
        assert loaded(rig, tokens(PROMPT)) == expected
        rig.check_nothing_left()


def test_a_prompt_that_is_not_worth_a_lookup_is_not_looked_up():
    with Rig("faulty://not-worth-it", engine(admission="cost", prefill_tokens_per_s=1e8)) as rig:
        admission = rig.scheduler.connector._scheduler._admission
        for _ in range(8):
            admission.note_lookup(0.0)
            admission.note_save(48, 48 * 1024)
            admission.note_load(0, 48, 48 * 1024, 0.05, near=False)
        assert loaded(rig, tokens(PROMPT)) == 0
        settle(rig)
        assert rig.counts.get("kvstore_lookups", 0) == 0
        assert rig.counts.get("kvstore_tokens_saved", 0) == 0
        assert "not-worth-it" in admission.explain()


def test_the_meter_is_told_the_end_of_each_step_that_it_is_told_the_begin_of():
    with Rig("faulty://metered", RigOptions(prefix_caching=False, measured=True)) as rig:
        for seed in range(12):
            rig.ask(tokens(PROMPT + 20 * seed, seed=seed), answer=3)
        rig.run()
        meter = rig.scheduler.connector._scheduler._meter
        assert not meter._steps
        assert meter.measured is not None
        assert rig.counts["kvstore_lookups"] == 12
