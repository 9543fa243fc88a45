"""The order of reads on a link that several loads share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.transfer.link import ASSUMED_BYTES_PER_S, PATIENCE, bytes_ahead, urgency

LINK = 1e8
GROUP = 8_000_000
moments = st.floats(0, 1e6)
sizes = st.integers(0, 10**10)
links = st.floats(1e5, 1e11)


def due(*, arrived_at: float = 0.0, needed_at: float = 0.0, remaining: int = GROUP, link: float | None = LINK) -> float:
    return urgency(
        arrived_at=arrived_at,
        needed_at=needed_at,
        group_bytes=min(GROUP, remaining),
        remaining_bytes=remaining,
        bandwidth=link,
    )


def test_of_two_engines_that_wait_the_one_with_less_left_goes_first() -> None:
    assert due(remaining=10**7) < due(remaining=10**8)


def test_of_two_equal_loads_the_earlier_goes_first() -> None:
    assert due(arrived_at=1.0) < due(arrived_at=1.1)


def test_an_engine_that_waits_goes_before_one_that_computes() -> None:
    assert due(remaining=10**8) < due(remaining=10**7, needed_at=60.0)


def test_a_group_is_due_before_it_is_needed_by_the_time_it_takes() -> None:
    now = due(needed_at=10.0)
    assert now == 10.0 - GROUP / LINK + PATIENCE * GROUP / LINK


def test_a_small_load_does_not_pass_one_that_has_waited_long() -> None:
    large = due(arrived_at=0.0, remaining=10**8)  # 1 s on the link
    assert due(arrived_at=PATIENCE - 0.5, remaining=10**6) < large
    assert due(arrived_at=PATIENCE + 0.1, remaining=10**6) > large


def test_an_unknown_link_orders_as_an_assumed_one() -> None:
    assert due(link=None, remaining=10**9) == due(link=ASSUMED_BYTES_PER_S, remaining=10**9)


@given(moments, sizes, sizes, links)
def test_a_load_that_an_engine_waits_for_gains_by_what_it_reads(
    arrived: float, left: int, read: int, link: float
) -> None:
    before = due(arrived_at=arrived, needed_at=arrived, remaining=left + read, link=link)
    assert due(arrived_at=arrived, needed_at=arrived, remaining=left, link=link) <= before


@given(moments, sizes, st.integers(1, 10**10), links)
def test_whatever_comes_later_than_its_patience_waits_for_a_load(
    arrived: float, mine: int, other: int, link: float
) -> None:
    patience = PATIENCE * mine / link
    late = arrived + patience + 1e-3 + arrived * 1e-9
    assert due(arrived_at=late, remaining=other, link=link) > due(arrived_at=arrived, remaining=mine, link=link)


@given(moments, st.floats(0, 100), st.floats(0, 100), sizes, links)
def test_what_is_needed_later_is_not_more_urgent(
    arrived: float, wait: float, more: float, remaining: int, link: float
) -> None:
    sooner = due(arrived_at=arrived, needed_at=arrived + wait, remaining=remaining, link=link)
    later = due(arrived_at=arrived, needed_at=arrived + wait + more, remaining=remaining, link=link)
    assert sooner <= later


def test_a_load_waits_for_the_bytes_of_those_before_it() -> None:
    assert bytes_ahead(5.0, [(4.0, 10), (5.0, 20), (5.1, 40)]) == 30
    assert bytes_ahead(5.0, []) == 0
