"""What a request may be held back for, and what is saved of long steps: the connector in vLLM's own scheduler."""

from __future__ import annotations

import logging
import time

import pytest

pytest.importorskip("vllm", reason="needs vLLM (make test-engine)")

from connectors.vllm.rig import Rig, RigOptions, tokens
from connectors.vllm.rig_model import Shape
from connectors.vllm.rig_store import Faults

from kvstore_s3.connectors.vllm.saves import SaveBudget

PREFIX = tokens(2048, seed=1)
BYTES_PER_TOKEN = 2 * Shape().layers * Shape().heads * Shape().head_dim * Shape().dtype.itemsize


def patient_options() -> RigOptions:
    extra = {"admission": "cost", "prefill_tokens_per_s": 500.0, "lookup_deadline_s": 60.0}
    return RigOptions(blocks=400, chunk_tokens=64, step_tokens=512, longest=4096, watched=False, extra=extra)


def test_what_was_waited_for_anothers_load_counts_against_ones_own():
    faults, prompt = Faults(), PREFIX[:512] + tokens(100, seed=2)
    with Rig("faulty://patience", patient_options(), faults) as rig:
        rig.ask(PREFIX, answer=1)
        rig.run()
    with Rig("faulty://patience", patient_options(), faults) as rig:
        faults.slow_reads_s = 5.0
        rig.ask(PREFIX + tokens(10, seed=3), answer=1)
        scheduler = rig.scheduler.connector._as_scheduler()
        while not scheduler._loads.any:
            rig.step()
        second = rig.ask(prompt, answer=1)
        state = scheduler._requests[second]
        while state.shares_since is None:
            rig.step()
        began = time.monotonic()
        while second not in rig.finished and not scheduler._loads.is_loading(second):
            rig.step()
        shared = time.monotonic() - began
        assert rig.counts["kvstore_loads_shared"] == 1
        assert shared >= 0.25 * len(prompt) / 500.0 / 2, "it shared for most of its patience"
        assert state.waited_s >= shared / 2
        if scheduler._loads.is_loading(second):
            pace = scheduler._loads._loads[second].order.pace
            assert pace.spent_s == state.waited_s
        faults.clear()
        rig.run()


@pytest.mark.parametrize("step_tokens", [64, 512])
def test_what_one_step_computed_is_saved_though_it_is_more_than_may_wait(step_tokens: int):
    options = RigOptions(
        blocks=64, chunk_tokens=64, step_tokens=step_tokens, extra={"save_memory_bytes": 320 * BYTES_PER_TOKEN}
    )
    for expected in (0, 384):
        with Rig(f"faulty://long-steps-{step_tokens}", options) as rig:
            name = rig.ask(tokens(400, seed=7), answer=1)
            rig.run()
            assert rig.external.get(name, 0) == expected
            rig.check_nothing_left()


def test_a_budget_takes_one_save_of_any_size_and_no_other_beside_it():
    budget = SaveBudget(10)
    assert budget.take(25)
    assert not budget.take(1)
    budget.give_back(25)
    assert budget.take(6)
    assert not budget.take(5)
    assert budget.take(4)


def test_saves_that_memory_has_no_room_for_are_told_of_once(caplog: pytest.LogCaptureFixture):
    faults = Faults(delay_s=(0.3, 0.3))
    options = RigOptions(chunk_tokens=48, extra={"save_memory_bytes": 50 * BYTES_PER_TOKEN})
    log = logging.getLogger("vllm.kvstore_s3")
    log.addHandler(caplog.handler)
    try:
        with Rig("faulty://full", options, faults) as rig:
            for seed in range(4):
                rig.ask(tokens(100, seed=seed), answer=1)
            rig.run()
            assert rig.counts["kvstore_saves_shed"] > 1
    finally:
        log.removeHandler(caplog.handler)
    told = {id(record) for record in caplog.records if "save_memory_bytes" in record.getMessage()}
    assert len(told) == 1, "the same record may come by way of two loggers"
