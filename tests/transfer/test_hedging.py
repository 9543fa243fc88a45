"""When a read is late, and how often a late one may be asked for twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.transfer.hedging import ENOUGH, FLOOR_S, HedgePolicy

MB = 1_000_000


def policy_of(times: list[float], size: int = MB, ratio: float = 0.02) -> HedgePolicy:
    policy = HedgePolicy(ratio)
    for seconds in times:
        policy.observe(size, seconds)
    return policy


def test_nothing_is_late_before_enough_is_known() -> None:
    policy = policy_of([0.1] * (ENOUGH - 1))
    assert policy.late_after(MB) is None
    policy.observe(MB, 0.1)
    assert policy.late_after(MB) == pytest.approx(0.1)


def test_late_is_what_takes_longer_than_99_of_100() -> None:
    policy = policy_of([0.1] * 197 + [0.12, 0.15, 2.0])
    assert policy.late_after(MB) == 0.15


def test_where_many_hang_late_is_twice_what_is_usual() -> None:
    policy = policy_of([0.1] * 190 + [5.0] * 10)
    assert policy.late_after(MB) == pytest.approx(0.2)


def test_nothing_is_late_before_the_floor() -> None:
    assert policy_of([0.001] * 50).late_after(MB) == FLOOR_S == 0.05


def test_larger_reads_may_take_longer_in_proportion_and_smaller_ones_as_long() -> None:
    policy = policy_of([0.2] * 50)
    assert policy.late_after(40 * MB) == pytest.approx(8.0)
    assert policy.late_after(1000) == pytest.approx(0.2)


def test_each_size_has_its_own_measure_once_it_is_known() -> None:
    policy = policy_of([1.0] * 50, size=10 * MB)
    for _ in range(50):
        policy.observe(1000, 0.06)
    assert policy.late_after(1000) == pytest.approx(0.06)
    assert policy.late_after(10 * MB) == pytest.approx(1.0)
    assert policy.late_after(MB // 4) == pytest.approx(1.0)


def test_old_reads_are_forgotten() -> None:
    policy = policy_of([5.0] * 50 + [0.1] * 300)
    assert policy.late_after(MB) == pytest.approx(0.1)


def test_a_ratio_of_zero_hedges_nothing() -> None:
    policy = policy_of([0.1] * 1000, ratio=0.0)
    assert policy.late_after(MB) is None
    assert not policy.allows


@given(st.lists(st.booleans(), max_size=600), st.sampled_from([0.01, 0.02, 0.1, 0.5]))
def test_no_more_than_the_share_is_hedged_and_a_few(late: list[bool], ratio: float) -> None:
    policy = HedgePolicy(ratio)
    hedged = 0
    for is_late in late:
        if is_late and policy.allows:
            policy.spend()
            hedged += 1
        policy.observe(MB, 0.1)
    assert hedged <= 1 + ratio * len(late)


def test_quiet_times_save_up_only_a_few_hedges() -> None:
    policy = policy_of([0.1] * 10_000)
    hedged = 0
    while policy.allows:
        policy.spend()
        hedged += 1
    assert hedged == 4
