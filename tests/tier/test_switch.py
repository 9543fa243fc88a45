"""Off after failures, on again by itself."""

from __future__ import annotations

from kvstore_s3.tier.switch import Switch


def test_it_goes_off_only_after_as_many_failures_in_a_row_as_are_allowed() -> None:
    switch = Switch(failures=2, pause_s=5)
    switch.failed(0)
    switch.worked()
    switch.failed(1)
    assert switch.is_on(1)
    switch.failed(2)
    assert not switch.is_on(6.9)
    assert switch.is_on(7)


def test_pauses_double_up_to_the_longest_and_success_makes_them_short_again() -> None:
    switch = Switch(failures=1, pause_s=5, longest_s=12)
    now, pauses = 0.0, []
    for _ in range(4):
        switch.failed(now)
        pause = next(step for step in range(100) if switch.is_on(now + step))
        pauses.append(pause)
        now += pause
    assert pauses == [5, 10, 12, 12]
    switch.worked()
    switch.failed(now)
    assert switch.is_on(now + 5)


def test_late_failures_of_work_begun_before_do_not_prolong_the_pause() -> None:
    switch = Switch(failures=1, pause_s=5)
    for now in (0, 1, 2, 3):
        switch.failed(now)
    assert switch.is_on(5)
