"""The estimator of the link: right on a link that is known, unmoved by idle times and by single small reads."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from simulated_link import MB, SimulatedLink, run_window

from kvstore_s3.transfer.bandwidth import Bandwidth, RecentLeast
from kvstore_s3.transfer.window import Limit


def test_nothing_is_known_before_anything_was_read() -> None:
    bandwidth = Bandwidth()
    assert (bandwidth.bytes_per_s, bandwidth.latency_s) == (None, 0.0)


def test_small_reads_tell_the_delay_and_only_many_of_them_a_rate() -> None:
    bandwidth = Bandwidth()
    bandwidth.observe(100, 0.0, 0.03, 1)
    bandwidth.observe(4096, 1.0, 1.02, 1)
    assert (bandwidth.bytes_per_s, bandwidth.latency_s) == (None, pytest.approx(0.02))
    bandwidth.observe_delay(0.01, 2.0)
    assert bandwidth.latency_s == 0.01


def test_one_large_read_is_enough_and_its_delay_is_not_charged() -> None:
    bandwidth = Bandwidth()
    bandwidth.observe_delay(0.02, 0.0)
    bandwidth.observe(8 * MB, 1.0, 1.10, 1)
    assert bandwidth.bytes_per_s == pytest.approx(100 * MB)


def test_idle_times_do_not_count() -> None:
    bandwidth = Bandwidth()
    for number in range(10):
        bandwidth.observe(8 * MB, number * 60.0, number * 60.0 + 0.1, 1)
    assert bandwidth.bytes_per_s == pytest.approx(80 * MB)


@pytest.mark.parametrize("in_flight", [1, 3, 16])
@pytest.mark.parametrize("jitter", [0.0, 1.0])
def test_it_finds_what_a_link_gives_however_many_reads_share_it(in_flight: int, jitter: float) -> None:
    link, bandwidth = SimulatedLink(500 * MB, 0.005, jitter=jitter), Bandwidth()
    moved = run_window(link, 10.0, lambda: 8 * MB, Limit(in_flight, in_flight), bandwidth)
    assert bandwidth.bytes_per_s == pytest.approx(moved, rel=0.25)


def test_it_finds_the_rate_in_reads_of_all_sizes_on_average() -> None:
    link, bandwidth, random = SimulatedLink(500 * MB, 0.005), Bandwidth(), Random(2)
    estimates = []
    for _ in range(40):
        run_window(link, 0.3, lambda: random.randint(MB // 4, 8 * MB), Limit(8, 8), bandwidth)
        estimates.append(bandwidth.bytes_per_s or 0.0)
    assert sum(estimates) / len(estimates) == pytest.approx(500 * MB, rel=0.1)
    assert all(0.6 < estimate / (500 * MB) < 1.6 for estimate in estimates)


@pytest.mark.parametrize("factor", [0.1, 5.0])
def test_a_step_is_believed_within_two_seconds_of_reading(factor: float) -> None:
    link, bandwidth = SimulatedLink(400 * MB, 0.005), Bandwidth()
    run_window(link, 5.0, lambda: 4 * MB, Limit(4, 4), bandwidth)
    link.bytes_per_s *= factor
    moved = run_window(link, 2.0, lambda: 4 * MB, Limit(4, 4), bandwidth)
    assert bandwidth.bytes_per_s == pytest.approx(moved, rel=0.35)


def test_a_small_lone_read_does_not_lower_what_is_known() -> None:
    bandwidth = Bandwidth()
    bandwidth.observe_delay(0.02, 0.0)
    for number in range(5):
        bandwidth.observe(16 * MB, number * 1.0, number + 0.18, 1)
    for number in range(20):
        bandwidth.observe(MB // 2, 10.0 + number, 10.025 + number, 1)
    assert bandwidth.bytes_per_s == pytest.approx(100 * MB)


def test_the_least_of_long_ago_is_forgotten() -> None:
    least = RecentLeast(10.0)
    for now, value in ((0.0, 1.0), (5.0, 3.0), (11.0, 4.0)):
        least.add(value, now)
    assert least.least == 1.0
    least.add(5.0, 22.0)
    assert least.least == 4.0


@example([(1 << 30, 0.0, 5e-324, 1)])
@given(
    st.lists(st.tuples(st.integers(1, 1 << 30), st.floats(0, 100), st.floats(0, 10), st.integers(0, 300)), max_size=60)
)
def test_whatever_is_told_the_rates_are_positive_and_finite(reads: list[tuple[int, float, float, int]]) -> None:
    bandwidth = Bandwidth()
    for size, started, seconds, in_flight in sorted(reads, key=lambda read: read[1] + read[2]):
        bandwidth.observe(size, started, started + seconds, in_flight)
        rate = bandwidth.bytes_per_s
        assert rate is None or 0 < rate < float("inf")
