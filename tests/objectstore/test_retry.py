"""When a request is tried again, and when it is not."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.config import Settings
from kvstore_s3.errors import KVStoreError, StoreRefusedError, StoreUnavailableError
from kvstore_s3.metrics import Counters
from kvstore_s3.objectstore.retry import RetryBudget, Retrying, pause_s


def test_a_budget_allows_its_burst_and_then_a_share_of_the_requests() -> None:
    budget = RetryBudget(0.25, burst=3)
    assert [budget.spend() for _ in range(4)] == [True, True, True, False]
    for _ in range(7):
        budget.earn()
    assert [budget.spend() for _ in range(2)] == [True, False]  # 7 quarters


def test_a_budget_saves_no_more_than_its_burst() -> None:
    budget = RetryBudget(1.0, burst=2)
    for _ in range(100):
        budget.earn()
    assert [budget.spend() for _ in range(3)] == [True, True, False]


@given(st.lists(st.booleans(), max_size=300), st.floats(0, 1), st.integers(1, 20))
def test_retries_never_exceed_the_share_and_the_burst(events: list[bool], ratio: float, burst: int) -> None:
    budget, earned, spent = RetryBudget(ratio, burst), 0, 0
    for retry in events:
        if retry:
            spent += budget.spend()
        else:
            budget.earn()
            earned += 1
    assert spent <= burst + ratio * earned + 1e-6


@given(st.integers(1, 50), st.floats(0, 1, exclude_max=True), st.floats(0, 100))
def test_a_pause_is_drawn_from_zero_to_a_bound_that_doubles_up_to_five_seconds(
    failures: int, draw: float, least: float
) -> None:
    assert least <= pause_s(failures, draw, least) <= max(least, min(5.0, 0.1 * 2 ** (failures - 1)))


def test_the_first_pauses_are_drawn_from_a_tenth_two_and_four_tenths_of_a_second() -> None:
    assert [pause_s(failures, 0.5) for failures in (1, 2, 3)] == pytest.approx([0.05, 0.1, 0.2])


class Script:
    """Attempts that fail as listed and then succeed; a Retrying that draws the longest pauses."""

    def __init__(self, *failures: type[KVStoreError], asked_s: float = 0.0, **settings: object) -> None:
        self.failures = list(failures)
        self.made = 0
        self.counters = Counters()
        self.asked_s = asked_s
        self.retrying = Retrying(
            Settings(**{"max_attempts": 4, **settings}),
            (OSError,),
            self.explain,
            draw=lambda: 0.0,
            count=self.counters.add,
        )

    def explain(self, error: Exception) -> tuple[KVStoreError, float]:
        return self.failures[self.made - 1]("mapped"), self.asked_s

    async def attempt(self) -> str:
        self.made += 1
        if self.made <= len(self.failures):
            raise OSError("foreign")
        return "done"

    async def run(self, again: bool = True) -> str:
        return await self.retrying.run(self.attempt, again=lambda error: again)


async def test_what_is_unavailable_is_tried_again_and_counted() -> None:
    script = Script(StoreUnavailableError, StoreUnavailableError)
    assert await script.run() == "done"
    assert script.made == 3
    assert script.counters.snapshot() == {"retries": 2}


async def test_the_last_attempt_raises_its_own_error() -> None:
    script = Script(*[StoreUnavailableError] * 9)
    with pytest.raises(StoreUnavailableError, match="mapped"):
        await script.run()
    assert script.made == 4


@pytest.mark.parametrize(("error", "again"), [(StoreRefusedError, True), (StoreUnavailableError, False)])
async def test_what_must_not_be_repeated_is_not(error: type[KVStoreError], again: bool) -> None:
    script = Script(error)
    with pytest.raises(error):
        await script.run(again)
    assert script.made == 1


async def test_without_a_token_in_the_budget_nothing_is_repeated() -> None:
    script = Script(*[StoreUnavailableError] * 100, retry_ratio=0.0, max_attempts=10)
    for made in (10, 12, 13):  # nine retries, one more, and none
        with pytest.raises(StoreUnavailableError):
            await script.run()
        assert script.made == made


async def test_a_server_that_asks_for_a_pause_gets_it() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert await Script(StoreUnavailableError, asked_s=0.3).run() == "done"
    assert loop.time() - began >= 0.29


async def test_a_pause_beyond_the_deadline_is_not_waited_for() -> None:
    script = Script(StoreUnavailableError, asked_s=5.0, request_deadline_s=2.0)
    with pytest.raises(StoreUnavailableError):
        await asyncio.wait_for(script.run(), 1)
    assert script.made == 1


async def test_all_attempts_together_end_with_the_deadline() -> None:
    script = Script(StoreUnavailableError, request_deadline_s=0.2)

    async def never() -> None:
        script.made += 1
        await asyncio.sleep(60)

    with pytest.raises(StoreUnavailableError):
        await asyncio.wait_for(script.retrying.run(never, again=lambda error: True), 5)
    assert script.made == 1
