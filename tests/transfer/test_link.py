"""The order of reads on a link that several loads share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.transfer.link import ASSUMED_BYTES_PER_S, PATIENCE, bytes_ahead, urgency

LINK = 1e8
moments = st.floats(0, 1e6)
sizes = st.integers(0, 10**10)
links = st.floats(1e5, 1e11)


def due(*, needed_at: float = 0.0, remaining: int = 10**7, link: float | None = LINK) -> float:
    return urgency(needed_at=needed_at, remaining_bytes=remaining, bandwidth=link)


def test_of_two_engines_that_wait_the_one_with_less_left_goes_first() -> None:
    assert due(remaining=10**7) < due(remaining=10**8)


def test_of_two_equal_loads_the_earlier_goes_first() -> None:
    assert due(needed_at=1.0) < due(needed_at=1.1)


def test_an_engine_that_waits_goes_before_one_that_computes() -> None:
    assert due(remaining=10**8) < due(remaining=10**7, needed_at=60.0)


def test_a_small_load_does_not_pass_one_that_has_waited_long() -> None:
    large = due(remaining=10**8)  # 1 s on the link
    assert due(needed_at=PATIENCE - 0.5, remaining=10**6) < large
    assert due(needed_at=PATIENCE + 0.1, remaining=10**6) > large


def test_an_unknown_link_orders_as_an_assumed_one() -> None:
    assert due(link=None, remaining=10**9) == due(link=ASSUMED_BYTES_PER_S, remaining=10**9)


@given(moments, sizes, sizes, links)
def test_a_load_gains_by_what_it_reads(needed: float, left: int, read: int, link: float) -> None:
    before = due(needed_at=needed, remaining=left + read, link=link)
    assert due(needed_at=needed, remaining=left, link=link) <= before


@given(moments, sizes, st.integers(1, 10**10), links)
def test_whatever_comes_later_than_its_patience_waits_for_a_load(
    needed: float, mine: int, other: int, link: float
) -> None:
    late = needed + PATIENCE * mine / link + 1e-3 + needed * 1e-9
    assert due(needed_at=late, remaining=other, link=link) > due(needed_at=needed, remaining=mine, link=link)


@given(moments, st.floats(0, 100), sizes, links)
def test_what_is_needed_later_is_not_more_urgent(needed: float, more: float, remaining: int, link: float) -> None:
    sooner = due(needed_at=needed, remaining=remaining, link=link)
    assert sooner <= due(needed_at=needed + more, remaining=remaining, link=link)


def test_a_load_waits_for_the_bytes_of_those_before_it() -> None:
    assert bytes_ahead(5.0, [(4.0, 10), (5.0, 20), (5.1, 40)]) == 30
    assert bytes_ahead(5.0, []) == 0
