"""The fault matrix, reads: what a load makes of a network and a server that fail, lie, or come back."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import pytest
from fault_proxy import Action, Rule
from faults.actions import (
    INTERNAL_ERROR,
    NO_SUCH_KEY,
    SLOW_DOWN,
    TOO_MANY,
    Answer,
    Break,
    Delay,
    Flip,
    Hang,
    IgnoredRange,
    Meanwhile,
    ShortRange,
    Stall,
    Substitute,
    Trickle,
    WrongRange,
)
from faults.scene import CHUNKS, NAMESPACE, PATIENT, TOKENS, Scene, same_bits, serve

from kvstore_s3.errors import StoreUnavailableError
from kvstore_s3.planner import PrefillSpeed
from kvstore_s3.streaming import Pace

pytestmark = pytest.mark.usefixtures("quiet", "no_leaks")

PASSING = {
    "503 SlowDown": SLOW_DOWN,
    "503 with Retry-After": Answer("503 Slow Down", "SlowDown", retry_after_s=1),
    "500": INTERNAL_ERROR,
    "429": TOO_MANY,
    "no answer": Hang(),
    "reset before the head": Break(after=-1),
    "closed before the head": Break(after=-1, reset=False),
}
IN_THE_BODY = {
    "reset in mid-body": Break(after=10_000),
    "short body": Break(after=10_000, reset=False),
    "closed after the head": Break(after=0, reset=False),
    "stall in mid-body": Stall(after=10_000),
    "stall after the head": Stall(after=0),
}


def with_names(faults: dict[str, Action]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", faults.values(), ids=faults.keys())


@with_names({**PASSING, **IN_THE_BODY})
async def test_a_fault_that_passes_costs_nothing_but_time(filled: Scene, fault: Action) -> None:
    async with filled.open(**({} if isinstance(fault, Hang | Stall) else PATIENT)) as store:
        with filled.proxy.fault("GetObject", fault, times=1) as rule:
            served = await serve(store, filled.kv)
        assert (served.tokens, served.error, rule.met) == (len(TOKENS), None, 1)
        filled.assert_in_time(served, store)
        counted = store.counters.snapshot()
        assert any(counted.get(name) for name in ("retries", "stale_connections", "hedges_won")), counted
        assert counted.get("data_plane_fallbacks", 0) == 0


@with_names(PASSING)
async def test_a_fault_of_a_lookup_that_passes_costs_nothing_but_time(filled: Scene, fault: Action) -> None:
    async with filled.open(**({} if isinstance(fault, Hang) else PATIENT)) as store:
        with filled.proxy.fault("HeadObject", fault, times=1) as rule:
            served = await serve(store, filled.kv)
        assert (served.tokens, served.error, rule.met) == (len(TOKENS), None, 1)


async def test_delays_cost_nothing_but_time(filled: Scene) -> None:
    filled.proxy.latency_s = 0.05
    async with filled.open(**PATIENT) as store:
        with filled.proxy.fault("GetObject", Delay(0.2), skip=1, times=2):
            await filled.assert_served_in_full(store)


@with_names({name: PASSING[name] for name in ("503 SlowDown", "500", "no answer", "reset before the head")})
async def test_a_fault_that_lasts_ends_the_load_in_time_and_heals_by_itself(filled: Scene, fault: Action) -> None:
    async with filled.open(breaker_pause_s=0.1) as store:
        with filled.proxy.fault("GetObject", fault):
            served = await serve(store, filled.kv)
        assert served.tokens < len(TOKENS)
        filled.assert_in_time(served, store)
        await healed(filled, store)


@pytest.mark.parametrize("outage", ["refuse", "black_hole"])
async def test_an_outage_ends_the_load_in_time_and_heals_by_itself(
    filled: Scene, outage: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with filled.open(breaker_pause_s=0.1, breaker_failures=2) as store:
        await filled.assert_served_in_full(store)
        getattr(filled.proxy, outage)()
        for _ in range(3):
            served = await serve(store, filled.kv)
            assert isinstance(served.error, StoreUnavailableError)
            filled.assert_in_time(served, store)
        assert "is not asked at the moment" in str(served.error), "a store known to be down costs each its time-outs"
        filled.proxy.recover()
        await healed(filled, store)
        assert store.counters.snapshot()["breaker_opened"] == 1
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "is left alone" in line] == lines[:1]
    assert [line for line in lines if "answers again" in line] == lines[1:]


async def test_an_outage_in_the_middle_of_a_load_ends_it_in_time(filled: Scene) -> None:
    async with filled.open(breaker_pause_s=0.1) as store:
        with filled.proxy.fault("GetObject", Meanwhile(filled.proxy.black_hole), skip=2, times=1):
            served = await serve(store, filled.kv)
        assert isinstance(served.error, StoreUnavailableError)
        filled.assert_in_time(served, store)
        filled.proxy.recover()
        await healed(filled, store)


async def healed(scene: Scene, store: object) -> None:
    """A store that works again is used again, soon and without being told."""
    for _ in range(300):
        served = await serve(store, scene.kv)  # type: ignore[arg-type]
        if served.tokens == len(TOKENS):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"the store works, and is not used: {served}")


async def test_connections_that_the_server_closed_while_idle_are_no_failure(filled: Scene) -> None:
    async with filled.open(max_attempts=1, read_timeout_s=20.0, request_deadline_s=40.0) as store:
        await filled.assert_served_in_full(store)
        for _ in range(3):
            filled.proxy.reset_connections()
            await filled.assert_served_in_full(store)


LIES = {
    "short 206": ShortRange(1000),
    "206 of one byte": ShortRange(1),
    "Content-Range one off": WrongRange(1),
    "Content-Range missing": WrongRange(0),
    "200 for a range": IgnoredRange(),
    "first byte flipped": Flip(0),
    "a byte flipped in the index": Flip(200),
    "a byte flipped in the middle": Flip(30_000),
    "last byte flipped": Flip(-1),
    "404": NO_SUCH_KEY,
}


@with_names(LIES)
async def test_a_wrong_answer_ends_the_hit_before_it(filled: Scene, fault: Action) -> None:
    async with filled.open(**PATIENT) as store:
        with filled.proxy.fault("GetObject", fault, filled.keys[2]):
            served = await serve(store, filled.kv)
            assert (served.tokens, served.error) == (2 * NAMESPACE.chunk_tokens, None)
            asked = filled.proxy.count("GetObject")
            assert (await store.lookup(TOKENS)).tokens <= served.tokens, "what failed is offered again at once"
            assert filled.proxy.count("GetObject") == asked
        assert store.counters.snapshot()["chunks_lost"] == 1


@pytest.mark.parametrize("of", [1, 3], ids=["the chunk before", "the chunk behind"])
async def test_the_bytes_of_another_object_end_the_hit(filled: Scene, of: int) -> None:
    other = await asyncio.to_thread(filled.read, filled.keys[of])
    async with filled.open(**PATIENT) as store:
        with filled.proxy.fault("GetObject", Substitute(other), filled.keys[2]):
            served = await serve(store, filled.kv)
    assert (served.tokens, served.error) == (2 * NAMESPACE.chunk_tokens, None)


@pytest.mark.parametrize("read", range(3))
async def test_an_object_deleted_under_its_reader_ends_the_hit(filled: Scene, read: int) -> None:
    victim = filled.keys[2]
    async with filled.open(**PATIENT) as store:
        hit = await store.lookup(TOKENS)
        assert hit.tokens == len(TOKENS)
        with filled.proxy.fault("GetObject", Meanwhile(lambda: filled.delete(victim)), victim, skip=read, times=1):
            assert (await serve(store, filled.kv)).tokens in (2 * NAMESPACE.chunk_tokens, len(TOKENS))
        assert (await serve(store, filled.kv)).tokens == 2 * NAMESPACE.chunk_tokens
        saved = await store.save(TOKENS, filled.kv)
        assert (saved.chunks_new, saved.chunks_present) == (1, CHUNKS - 1)
        await filled.assert_served_in_full(store)


async def test_a_body_that_breaks_off_is_resumed_where_it_broke(filled: Scene) -> None:
    async with filled.open(**PATIENT) as store:
        hit = await store.lookup(TOKENS)
        filled.proxy.clear()
        with filled.proxy.fault("GetObject", Break(after=10_000), filled.keys[1], times=1):
            assert same_bits(await store.load(hit), filled.kv)
        assert store.counters.snapshot()["resumed_bodies"] == 1
    asked = [seen.request for seen in filled.proxy.requests if seen.request.path.endswith(filled.keys[1])]
    begin, end = asked[0].range or (0, 0)
    resumed = next(request for request in asked[1:] if request.range and request.range[1] == end)
    assert resumed.range == (begin + 10_000, end)
    assert resumed.get("if-match"), "the rest must be of the same object"


async def test_an_object_replaced_under_its_reader_is_never_mixed_with_its_successor(filled: Scene) -> None:
    other = await asyncio.to_thread(filled.read, filled.keys[3])
    victim = filled.keys[1]
    filled.proxy.add(
        Rule("GetObject", Meanwhile(lambda: filled.write(victim, other)), victim, skip=1, times=1),
        Rule("GetObject", Break(after=10_000), victim, times=1),
    )
    async with filled.open(**PATIENT) as store:
        served = await serve(store, filled.kv)
    assert (served.tokens, served.error) == (NAMESPACE.chunk_tokens, None)


async def test_a_body_that_trickles_is_given_up_and_asked_for_again(filled: Scene) -> None:
    async with filled.open(hedge_ratio=0.0) as store:
        with filled.proxy.fault("GetObject", Trickle(1_000), times=1) as rule:
            served = await serve(store, filled.kv)
        assert (served.tokens, served.error, rule.met) == (len(TOKENS), None, 1)
        assert served.seconds < 30, "at that speed it takes a minute"
        assert store.counters.snapshot()["slow_transfers"] >= 1


async def test_a_read_that_is_late_is_asked_for_again_and_the_first_answer_counts(filled: Scene) -> None:
    async with filled.open(hedge_ratio=0.5, read_timeout_s=40.0, request_deadline_s=60.0) as store:
        for _ in range(3):
            await filled.assert_served_in_full(store)
        with filled.proxy.fault("GetObject", Delay(30.0), times=1) as rule:
            served = await serve(store, filled.kv)
        assert (served.tokens, served.error, rule.met) == (len(TOKENS), None, 1)
        assert served.seconds < 15
        assert store.counters.snapshot()["hedges_won"] >= 1


@pytest.mark.parametrize("server", ["moto"], indirect=True)  # a question to the planner, not to a server
@with_names({"no answer": Hang(), "stall in mid-body": Stall(after=10_000), "trickle": Trickle(20_000)})
@pytest.mark.parametrize("known", [False, True], ids=["first load", "known link"])
async def test_a_load_that_stalls_costs_a_quarter_of_the_prefill_at_most(
    filled: Scene, fault: Action, known: bool
) -> None:
    seconds_per_token = 0.02
    pace = Pace(PrefillSpeed(seconds_per_token), len(TOKENS))
    async with filled.open(read_timeout_s=40.0, request_deadline_s=60.0, hedge_ratio=0.0) as store:
        if known:
            await filled.assert_served_in_full(store)
        hit, tokens = await store.lookup(TOKENS), 0
        begin = time.monotonic()
        with filled.proxy.fault("GetObject", fault, skip=1), suppress(StoreUnavailableError):
            tokens = (await store.load(hit, pace=pace)).shape[2]
        added_s = time.monotonic() - begin - tokens * seconds_per_token
    assert added_s < 0.25 * len(TOKENS) * seconds_per_token + 15.0, "far less than the read timeout"


async def test_many_loads_through_few_buffers_neither_fail_nor_wait_for_ever(filled: Scene) -> None:
    async with filled.open(buffer_bytes=1024 * 1024, request_deadline_s=50.0, read_timeout_s=20.0) as store:
        with filled.proxy.fault("GetObject", Break(after=10_000), skip=5, times=5):
            served = await asyncio.wait_for(asyncio.gather(*(serve(store, filled.kv) for _ in range(12))), 60)
        assert [(one.tokens, one.error) for one in served] == [(len(TOKENS), None)] * 12
