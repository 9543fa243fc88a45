"""New weights in the middle of traffic: what was stored before is not loaded, what is mixed is not saved."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

from connectors.vllm.rig import Rig, RigOptions, tokens  # noqa: E402
from connectors.vllm.rig_store import Faults  # noqa: E402
from connectors.vllm.rig_traffic import Habits, Traffic, check_store  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402

PROMPT = tokens(400)
BASE = RigOptions(blocks=48, prefix_caching=False)
OPTIONS = {
    "a prefix cache": replace(BASE, prefix_caching=True),
    "by layer": replace(BASE, prefix_caching=True, extra={"load_mode": "by-layer"}),
    "every prefix from the store": BASE,
    "two ranks": replace(BASE, ranks=2),
}


def start_with(store: str, options: RigOptions) -> None:
    """Partitions are known to the store, and the prompt is in it."""
    with Rig(store, options) as rig:
        rig.ask(PROMPT)
        rig.run()


@pytest.mark.parametrize(
    ("name", "preempt"),
    [
        ("a prefix cache", True),  # which vLLM does not reset while requests run, and says so
        ("by layer", True),
        ("every prefix from the store", True),
        ("every prefix from the store", False),
        ("two ranks", False),
    ],
)
def test_weights_that_change_in_mid_traffic(name: str, preempt: bool):
    options = OPTIONS[name]
    store, epochs = f"faulty://reset-{name}-{preempt}".replace(" ", "-").lower(), [b""]
    start_with(store, options)
    with Rig(store, options, Faults(delay_s=(0.0, 0.01))) as rig:
        half = rig.scheduler.connector._scheduler
        due = {30, 60, 90}

        def change(step: int) -> None:
            if due and step >= min(due) and rig.change_weights(preempt=preempt):
                due.remove(min(due))
                epochs.append(half._epoch_key)

        traffic = Traffic(rig, Habits(requests=80, answer=20), seed=len(name))
        traffic.run(each_step=change)
        rig.ask(PROMPT)
        rig.run()
        rig.check_nothing_left()
        assert rig.weights == 3
        assert len(rig.finished) + sum(traffic.aborted_in.values()) == 81
    prompts = [*traffic.prompts, (PROMPT, None)]
    found = [
        check_store(store, rig.formula, prompts, chunk_tokens=48, epoch=epoch, weights=number)
        for number, epoch in enumerate(epochs)
    ]
    assert found[0]
    assert found[-1], "what the new weights computed was saved"


@pytest.mark.parametrize("status", ["WAITING", "WAITING_FOR_REMOTE_KVS", "loaded", "RUNNING"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_request_that_is(status: str, ranks: int):
    """Its lookup, or its load, or its saves are under way when the weights change."""
    options, store = replace(BASE, ranks=ranks, step_tokens=100), f"faulty://reset-{status}-{ranks}".lower()
    start_with(store, options)
    faults = Faults(delay_s=(0.03, 0.06))
    with Rig(store, options, faults) as rig:
        name = rig.ask(PROMPT if status != "RUNNING" else tokens(400, seed=1))
        if status == "loaded":
            rig.run(until=lambda: name in rig.scheduler.finished_recving_kv_req_ids)
        else:
            rig.run(until=rig.until(name, RequestStatus[status]))
        assert name in rig.asked
        rig.change_weights(preempt=False)
        epoch = rig.scheduler.connector._scheduler._epoch_key
        after = rig.ask(PROMPT)
        rig.run()
        rig.check_nothing_left()
        assert rig.loaded_tokens(after) == 0, "of the old weights nothing is loaded"
        faults.clear()
        for _ in range(20):  # what was computed is being saved
            again = rig.ask(PROMPT)
            rig.run()
            if rig.loaded_tokens(again) == 384:
                break
        assert rig.loaded_tokens(again) == 384, "of the new ones it is"
    for weights, key in enumerate((b"", epoch)):
        prompts = [(PROMPT, None), (tokens(400, seed=1), None)]
        assert check_store(store, rig.formula, prompts, chunk_tokens=48, epoch=key, weights=weights) >= 384


def test_two_engines_that_were_reset_share_nothing_with_each_other():
    """Nobody says that both were given the same weights."""
    for _ in range(2):
        with Rig("faulty://reset-two", BASE) as rig:
            rig.change_weights()
            name = rig.ask(PROMPT)
            rig.run()
            assert rig.loaded_tokens(name) == 0
