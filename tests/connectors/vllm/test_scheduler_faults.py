"""A store that fails in the middle of traffic: every request ends, with right tokens, and nothing is left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

from connectors.vllm.rig import Rig, RigOptions, tokens  # noqa: E402
from connectors.vllm.rig_store import Faults  # noqa: E402
from connectors.vllm.rig_traffic import Habits, Traffic, check_store  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402

QUICK = {"BREAKER_PAUSE_S": "0.05", "CONNECT_TIMEOUT_S": "0.2"}
PATIENCE = {"lookup_deadline_s": 0.3, "load_deadline_s": 1.0}

FAULTS = {
    "slow": Faults(delay_s=(0.0, 0.05)),
    "slower than the deadlines": Faults(delay_s=(0.2, 1.5)),
    "damaged": Faults(damaged=0.1),
    "vanishing": Faults(vanished=0.1),
    "unavailable now and then": Faults(unavailable=0.1),
    "busy": Faults(busy=0.1),
    "all of it": Faults(delay_s=(0.0, 0.02), damaged=0.05, vanished=0.05, unavailable=0.03, busy=0.03),
}


MODES = {
    "between steps": RigOptions(blocks=32, prefix_caching=False, settings=QUICK, extra=PATIENCE),
    "by layer": RigOptions(blocks=32, settings=QUICK, extra={**PATIENCE, "load_mode": "by-layer"}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAULTS)
def test_faults_end_in_computing(name: str, mode: str):
    faults, store = replace(FAULTS[name], calls={}, created=[]), f"faulty://faults-{name}-{mode}".replace(" ", "-")
    options = MODES[mode]
    with Rig(store, options, faults) as rig:
        traffic = Traffic(rig, Habits(requests=70), seed=len(name))
        traffic.run()
        rig.check_nothing_left()
        assert len(rig.finished) + sum(traffic.aborted_in.values()) == 70
    faults.clear()
    check_store(store, rig.formula, traffic.prompts, chunk_tokens=48)


def test_a_store_that_goes_and_comes_back_is_used_again():
    options = RigOptions(blocks=32, prefix_caching=False, settings=QUICK, extra=PATIENCE)
    with Rig("faulty://outage", options) as rig:

        def change(step: int) -> None:
            rig.faults.out = 40 <= step < 120

        traffic = Traffic(rig, Habits(requests=120), seed=7)
        traffic.run(each_step=change)
        assert rig.counts.get("kvstore_tokens_loaded", 0) > 0
        rig.faults.out = False
        prompt = tokens(200, seed=9)
        for _ in range(200):  # it takes a moment until the store is trusted again
            name = rig.ask(prompt)
            rig.run()
            if rig.external.get(name):
                break
        assert rig.external.get(name) == 192, "used again"
        rig.check_nothing_left()
    check_store("faulty://outage", rig.formula, traffic.prompts, chunk_tokens=48)


def test_a_load_that_fails_is_not_offered_again_at_once_and_is_mended():
    prompt = tokens(200)
    options = RigOptions(prefix_caching=False)
    with Rig("faulty://mended", options) as rig:
        rig.ask(prompt)
        rig.run()
    with Rig("faulty://mended", options, Faults(damaged=1.0)) as rig:
        name = rig.ask(prompt)
        rig.run()
        assert rig.counts["kvstore_loads"] == 1, "one attempt, and then the prompt is computed"
        assert rig.external == {name: 192}
        rig.faults.clear()
        for _ in range(50):  # the save that mends it may still be under way
            name = rig.ask(prompt)
            rig.run()
            if rig.external.get(name) == 192:
                break
        assert rig.external.get(name) == 192
        assert rig.counts["kvstore_tokens_loaded"] >= 192
        rig.check_nothing_left()


def test_a_small_slab_pool_makes_loads_wait_and_nothing_else(no_leaks: None):
    options = RigOptions(
        blocks=200, prefix_caching=False, running=16, step_tokens=512, settings={"BUFFER_BYTES": str(1 << 20)}
    )
    prompts = [tokens(960, seed=seed) for seed in range(12)]
    for engine in ("cold", "warm"):
        with Rig("faulty://slabs", options, Faults(delay_s=(0.005, 0.02))) as rig:
            for prompt in prompts:
                rig.ask(prompt)
            rig.run()
            rig.check_nothing_left()
            if engine == "warm":
                assert rig.counts["kvstore_tokens_loaded"] == 12 * 960


@pytest.mark.parametrize("moment", ["WAITING", "WAITING_FOR_REMOTE_KVS", "RUNNING", "in the middle of a step"])
def test_an_abort_at_any_moment_gives_everything_back(moment: str):
    prompt = tokens(400)
    options = RigOptions(prefix_caching=False, blocks=40, step_tokens=100)
    with Rig(f"faulty://abort-{moment.replace(' ', '-').lower()}", options) as rig:
        rig.ask(prompt)
        rig.run()
        rig.faults.delay_s = (0.05, 0.1)
        for _ in range(5):
            if moment == "RUNNING":
                prompt = tokens(400, seed=rig.steps)
            name = rig.ask(prompt)
            if moment == "in the middle of a step":
                rig.run(until=rig.until(name, RequestStatus.WAITING_FOR_REMOTE_KVS))
                rig.step(during=lambda name=name: rig.abort(name))
            else:
                rig.run(until=rig.until(name, RequestStatus[moment]))
                rig.abort(name)
            others = rig.ask(tokens(300, seed=rig.steps))  # takes over the blocks as soon as it can
            rig.run(until=lambda others=others: others in rig.finished)
        rig.run()
        rig.check_nothing_left()
