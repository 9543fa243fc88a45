from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.objectstore.breaker import Breaker, Ticket


def make(failures: int = 3, pause_s: float = 1.0, spread: float = 0.5) -> Breaker:
    return Breaker(failures=failures, pause_s=pause_s, spread=lambda: spread)


def admitted(breaker: Breaker, now: float) -> Ticket:
    ticket = breaker.admit(now)
    assert ticket is not None
    return ticket


def opened(now: float = 0.0, **options: float) -> Breaker:
    breaker = make(failures=1, **options)
    assert breaker.fail(admitted(breaker, now), now, "it failed")
    return breaker


def test_it_opens_at_the_limit_of_failures_in_a_row() -> None:
    breaker = make(failures=3)
    outcomes = [breaker.fail(admitted(breaker, 0), 0, "it failed") for _ in range(3)]
    assert outcomes == [False, False, True]
    assert not breaker.closed
    assert breaker.admit(0.5) is None
    assert breaker.reason == "it failed"


def test_a_success_between_failures_starts_the_count_again() -> None:
    breaker = make(failures=2)
    breaker.fail(admitted(breaker, 0), 0, "it failed")
    breaker.succeed(admitted(breaker, 0), 0)
    assert not breaker.fail(admitted(breaker, 0), 0, "it failed")
    assert breaker.closed


def test_a_grave_failure_opens_it_at_once() -> None:
    breaker = make(failures=100)
    assert breaker.fail(admitted(breaker, 0), 0, "slow down", at_once=True)
    assert not breaker.closed


def test_after_the_pause_one_trial_alone_is_let_through() -> None:
    breaker = opened()
    assert breaker.retry_at == 1.0
    assert breaker.admit(0.99) is None
    assert admitted(breaker, 1.0).trial
    assert breaker.admit(1.0) is None


def test_a_trial_that_succeeds_closes_it() -> None:
    breaker = opened()
    assert breaker.succeed(admitted(breaker, 1.0), 1.2)
    assert breaker.closed
    assert not admitted(breaker, 1.2).trial


def test_each_trial_that_fails_doubles_the_pause_up_to_thirty_times() -> None:
    breaker, pauses = opened(), []
    for _ in range(7):
        now = breaker.retry_at
        assert not breaker.fail(admitted(breaker, now), now, "still")
        pauses.append(breaker.retry_at - now)
    assert pauses == pytest.approx([2, 4, 8, 16, 30, 30, 30])


def test_pauses_differ_by_a_quarter_at_most() -> None:
    assert opened(spread=0.0).retry_at == pytest.approx(0.75)
    assert opened(spread=1.0).retry_at == pytest.approx(1.25)


def test_a_trial_that_was_cancelled_makes_room_for_the_next() -> None:
    breaker = opened()
    breaker.release(admitted(breaker, 1.0))
    assert admitted(breaker, 1.0).trial


def test_requests_from_before_it_opened_count_neither_way() -> None:
    breaker = make(failures=1)
    early, late, other = (admitted(breaker, 0) for _ in range(3))
    breaker.fail(early, 0, "the first")
    retry_at = breaker.retry_at
    assert not breaker.fail(late, 5, "a late one")
    assert not breaker.succeed(other, 5)
    assert not breaker.closed
    assert (breaker.retry_at, breaker.reason) == (retry_at, "the first")


def test_failures_from_before_it_closed_do_not_open_it_again() -> None:
    breaker = opened()
    stuck = breaker.admit_probe()
    breaker.succeed(admitted(breaker, 1.0), 1.0)
    assert not breaker.fail(stuck, 2.0, "a late one")
    assert breaker.closed


def test_a_probe_goes_through_at_any_time_and_closes_it() -> None:
    breaker = opened()
    probe = breaker.admit_probe()
    assert probe.trial
    assert breaker.succeed(probe, 0.1)
    assert breaker.closed


def test_a_probe_does_not_take_the_place_of_the_trial() -> None:
    breaker = opened()
    breaker.admit_probe()
    assert breaker.admit(1.0) is not None


def test_it_pauses_longer_if_it_opens_again_soon_after_it_closed() -> None:
    breaker = opened(0.0)
    breaker.succeed(admitted(breaker, 1.0), 1.0)
    breaker.fail(admitted(breaker, 1.5), 1.5, "again")
    assert breaker.retry_at - 1.5 == pytest.approx(2.0)


def test_it_forgets_long_pauses_after_a_calm_time() -> None:
    breaker = opened(0.0)
    breaker.succeed(admitted(breaker, 1.0), 1.0)
    breaker.fail(admitted(breaker, 2.5), 2.5, "again")
    assert breaker.retry_at - 2.5 == pytest.approx(1.0)


STEPS = st.lists(
    st.tuples(st.sampled_from(["succeed", "fail", "release"]), st.booleans(), st.floats(0, 3), st.integers(0, 4)),
    max_size=60,
)


@given(STEPS)
def test_it_never_gets_stuck_and_never_has_two_trials(steps: list[tuple[str, bool, float, int]]) -> None:
    breaker, now = make(failures=2), 0.0
    out: list[Ticket] = []
    for outcome, probe, passed, index in steps:
        now += passed
        ticket = breaker.admit_probe() if probe else breaker.admit(now)
        if ticket is not None:
            out.append(ticket)
        if outcome == "release" and len(out) > index:
            breaker.release(out.pop(index))
        elif outcome == "succeed" and len(out) > index:
            breaker.succeed(out.pop(index), now)
        elif len(out) > index:
            breaker.fail(out.pop(index), now, "it failed")
        assert breaker.closed or breaker.retry_at <= now + 30 * 1.25
    for ticket in out:
        breaker.release(ticket)
    later = max(now, breaker.retry_at)
    last = admitted(breaker, later)
    assert breaker.closed or breaker.admit(later) is None
    breaker.succeed(last, later)
    assert breaker.closed
