"""The scheduler's thread never waits: a store that takes half a second to answer, and a thousand requests."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

from connectors.vllm.rig import Rig, RigOptions, tokens  # noqa: E402
from connectors.vllm.rig_store import Faults  # noqa: E402

SLOW_S = 0.5
LONG = 100_000
REQUESTS = 1000
MOST_WORK_S = 0.001
"""99th percentile of the CPU time of each call."""


def test_no_call_of_the_scheduler_waits_for_the_store_or_works_for_long():
    """A new request at each step or two, some of them seen before, some aborted, one of 100,000 tokens."""
    options = RigOptions(
        blocks=LONG // 32 + 2000,
        longest=LONG + 100,
        step_tokens=8192,
        running=256,
        chunk_tokens=256,
        extra={"lookup_deadline_s": 2.0},
        prefix_caching=False,
        watched=False,
    )
    prompts = [tokens(260 + number % 7 * 50, seed=number) for number in range(REQUESTS // 4)]
    with Rig("faulty://latency", options) as rig:
        for prompt in prompts[::2]:
            rig.ask(prompt, answer=1, salt="tenant 0")
            rig.run(until=lambda: len(rig.asked) < 16)
        rig.run()
    with Rig("faulty://latency", options, Faults(delay_s=(SLOW_S, SLOW_S))) as rig:
        rig.ask(tokens(LONG), answer=2)
        for number in range(REQUESTS):
            name = rig.ask(prompts[number % len(prompts)], answer=2, salt=f"tenant {number % 2}")
            rig.run(until=iter((False,) * (number % 2 + 1) + (True,)).__next__)
            if number % 20 == 0:
                rig.abort(name)
        rig.run()
        rig.check_nothing_left()
        rig.faults.clear()  # closing the engine need not wait for all those saves
        assert len(rig.spent["on_new_request"]) == REQUESTS + 1
        assert sum(rig.external.values()) > 0
    # By the clock, a busy machine may take a processor away at any moment, so there the bound is the store's delay.
    worked = {name: f"{percentile(spent, 0.99) * 1000:.2f} ms" for name, spent in rig.worked.items() if spent}
    by_clock = {name: f"{percentile(spent, 0.99) * 1000:.2f} ms" for name, spent in rig.spent.items() if spent}
    print(f"99th percentiles: work {worked}, by the clock {by_clock}")
    assert max(percentile(spent, 0.99) for spent in rig.worked.values() if spent) <= MOST_WORK_S, worked
    assert max(percentile(spent, 0.9) for spent in rig.spent.values() if spent) <= 0.02, by_clock
    waited = sum(seconds >= SLOW_S for spent in rig.spent.values() for seconds in spent)
    assert waited <= 3, "calls waited for the store, and not for a machine that stood still"


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]
