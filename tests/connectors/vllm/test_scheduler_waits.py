"""How long requests wait for the store, what a failed load by layer leaves behind, and resets that vLLM refuses."""

from __future__ import annotations

import time
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

from connectors.vllm.rig import Rig, RigOptions, tokens  # noqa: E402
from connectors.vllm.rig_store import Faults  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402

from kvstore_s3.connectors.vllm.loading import LoadsUnderWay  # noqa: E402
from kvstore_s3.connectors.vllm.loads import LoadUnderWay  # noqa: E402
from kvstore_s3.connectors.vllm.messages import LoadOrder, LoadReport  # noqa: E402
from kvstore_s3.connectors.vllm.plans import TokenRange  # noqa: E402

COST: dict[str, Any] = {"prefill_tokens_per_s": 1000.0, "admission": "cost"}


def seconds_to_first_token(rig: Rig, name: str) -> float:
    begun = time.monotonic()
    rig.run(until=lambda: name in rig.finished or bool(rig.asked[name].tokens), limit_s=100)
    return time.monotonic() - begun


def test_a_prompt_that_the_engine_holds_itself_does_not_wait_for_the_store():
    prompt = tokens(1000)
    with Rig("faulty://local", RigOptions(blocks=100, longest=2048, step_tokens=2048, extra=COST)) as rig:
        rig.ask(prompt)
        rig.run()
        rig.faults.delay_s = (2.0, 2.0)
        name = rig.ask(prompt + tokens(8, seed=7))
        assert seconds_to_first_token(rig, name) < 1.0
        rig.faults.clear()
        rig.run()


def test_another_requests_load_is_waited_for_no_longer_than_it_pays():
    long = tokens(2000)
    short = long[:60] + tokens(40, seed=5)
    options = RigOptions(blocks=200, longest=4096, step_tokens=4096, extra=COST)
    with Rig("faulty://shared", options) as rig:
        rig.ask(long)
        rig.run()
    with Rig("faulty://shared", options) as rig:
        rig.ask(tokens(100, seed=77))
        rig.run()
        rig.faults.slow_reads_s = 3.0
        first = rig.ask(long)
        rig.run(until=rig.until(first, RequestStatus.WAITING_FOR_REMOTE_KVS))
        second = rig.ask(short)
        assert seconds_to_first_token(rig, second) < 1.0, "a quarter of 100 ms, and what the rig takes"
        rig.faults.clear()
        rig.run()
        rig.check_nothing_left()


def test_what_was_computed_behind_a_failed_load_by_layer_is_forgotten_after_an_abort():
    prompt = tokens(400)
    longer = prompt + tokens(100, seed=3)
    options = RigOptions(blocks=64, step_tokens=1024, extra={"load_mode": "by-layer"})
    with Rig("faulty://abort", options) as rig:
        rig.ask(prompt)
        rig.run()
        time.sleep(0.3)
    with Rig("faulty://abort", options, Faults(damaged=1.0)) as rig:
        aborted = rig.ask(longer)
        for _ in range(3000):
            rig.step(during=lambda: rig.abort(aborted) if rig.external.get(aborted) else None)
            if rig.external.get(aborted):
                break
        assert rig.external[aborted] == 384
        rig.faults.clear()
        rig.run()
        for later in (prompt[:390], longer):  # the rig finds wrong KV in any block that they use
            rig.ask(later)
            rig.run()
        rig.check_nothing_left()


def test_a_reset_that_the_engine_does_not_finish_saves_nothing_old():
    prompt = tokens(400)
    with Rig("faulty://kept", RigOptions(blocks=64, step_tokens=1024)) as rig:
        rig.ask(prompt)
        rig.run()
        running = rig.ask(tokens(100, seed=9), answer=200)
        rig.run(until=lambda: len(rig.asked[running].tokens) > 3)
        assert rig.scheduler.reset_prefix_cache(reset_connector=True) is False
        before = rig.faults.chunks_created
        second = rig.ask(prompt + tokens(100, seed=4))
        rig.run(until=lambda: second in rig.finished)
        time.sleep(0.3)
        rig.run()
        assert rig.faults.chunks_created == before


def order_of(name: str, keys: tuple[bytes, ...]) -> LoadOrder:
    return LoadOrder(name, TokenRange(0, len(keys)), (0,), 0, keys, (), None)


def test_the_quality_of_what_was_loaded_is_remembered_for_what_is_computed_from_it():
    loads = LoadsUnderWay(1, lifetime_s=60.0)
    keys = tuple(bytes([number]) * 32 for number in range(4))
    assert loads.quality_of(keys) == "lossless"
    loads.add(order_of("a", keys[:2]), (0,))
    loads.note(LoadReport("a", 2, None, "small", 0.1, near=False))
    assert loads.quality_of(keys[2:]) == "lossless"
    assert loads.quality_of(keys) == loads.quality_of(keys[:1]) == "small"


def test_of_two_ranks_that_stop_at_one_token_the_one_that_found_damage_says_why():
    loads = LoadsUnderWay(2, lifetime_s=60.0)
    loads.add(order_of("a", (b"k" * 32,) * 4), (0,))
    assert loads.note(LoadReport("a", 2, "given-up", "lossless", 0.1, near=False)) is None
    ended = loads.note(LoadReport("a", 2, "damaged", "lossless", 0.1, near=True))
    assert ended is not None
    assert (ended.good, ended.reason, ended.lost, ended.near) == (2, "damaged", True, False)


def test_a_load_ends_with_its_last_page_and_not_with_the_engines_step(monkeypatch: pytest.MonkeyPatch):
    step_s, seconds, prompt = 0.5, list[float](), tokens(200)
    forward, report = Rig._forward, LoadUnderWay.report

    def long_forward(rig: Rig, rank: Any, output: Any) -> Any:
        rank.connector.wait_for_layer_load(rank.layer_names[0])  # pages may be written from here on
        time.sleep(step_s)
        return forward(rig, rank, output)

    def note(load: LoadUnderWay) -> LoadReport:
        found = report(load)
        seconds.append(found.seconds)
        return found

    options = RigOptions(prefix_caching=False)
    with Rig("faulty://seconds", options) as rig:
        rig.ask(prompt)
        rig.run()
    with Rig("faulty://seconds", options) as rig:
        rig.ask(tokens(50, seed=9), answer=8)
        rig.step()
        monkeypatch.setattr(Rig, "_forward", long_forward)
        monkeypatch.setattr(LoadUnderWay, "report", note)
        name = rig.ask(prompt)
        rig.run(until=lambda: name in rig.finished, limit_s=60)
        monkeypatch.undo()
        rig.run()
        assert rig.external[name] > 0
    assert seconds
    assert max(seconds) < step_s / 2
