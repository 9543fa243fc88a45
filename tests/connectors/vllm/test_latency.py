"""The scheduler's thread never waits: a store that takes half a second to answer, and a thousand requests."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

from connectors.vllm.rig import Rig, RigOptions, tokens  # noqa: E402
from connectors.vllm.rig_store import Faults  # noqa: E402
from connectors.vllm.rig_traffic import Habits, Traffic  # noqa: E402

SLOW = Faults(delay_s=(0.5, 0.5))
LONG = 100_000


def test_every_call_of_the_scheduler_takes_a_millisecond_at_most():
    options = RigOptions(
        blocks=LONG // 32 + 600,
        longest=LONG + 100,
        step_tokens=8192,
        running=64,
        chunk_tokens=256,
        prefix_caching=False,
    )
    with Rig("faulty://latency", options, SLOW) as rig:
        traffic = Traffic(rig, Habits(requests=1000, longest=1000, at_once=128, aborts=0.05), seed=1)
        rig.ask(tokens(LONG), answer=2)
        traffic.run(limit_s=100)
        rig.check_nothing_left()
        assert len(rig.finished) + sum(traffic.aborted_in.values()) == 1001
        slowest = rig.percentile(0.99)
        assert len(rig.spent["on_new_request"]) == 1001
    late = {name: f"{seconds * 1000:.2f} ms" for name, seconds in slowest.items() if seconds > 0.001}
    assert not late, f"99th percentiles above a millisecond: {late}; all: {slowest}"
