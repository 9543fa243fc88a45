"""What prefill and loads cost, learned from their times."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.connectors.vllm.costs import LinearFit, PrefillMeter, recall, remember, speed_file
from kvstore_s3.planner import PrefillSpeed

EACH, POSITION, STEP = 1e-4, 4e-9, 8e-3
BUDGET = 2048


def step_seconds(begin: int, end: int, decodes: int = 0) -> float:
    """An engine as it should be: a fixed time, one for each token, and attention."""
    return STEP + (end - begin + decodes) * EACH + (end - begin) * (begin + end) / 2 * POSITION


class Engine:
    """Computes prompts in steps of `BUDGET` tokens on a clock of its own and tells the meter."""

    def __init__(self, meter: PrefillMeter, *, noise: float = 0.0, outliers: float = 0.0, seed: int = 1) -> None:
        self.meter, self.now, self.slower = meter, 100.0, 1.0
        self._noise, self._outliers, self._random = noise, outliers, random.Random(seed)

    def compute(self, prompt: int, *, budget: int = BUDGET, decodes: int = 0) -> None:
        for begin in range(0, prompt, budget):
            end = min(begin + budget, prompt)
            factor = self._random.lognormvariate(0, self._noise) * self.slower
            if self._random.random() < self._outliers:
                factor *= 20
            self.step([(begin, end)], decodes, step_seconds(begin, end, decodes) * factor)

    def step(self, spans: list[tuple[int, int]], decodes: int, seconds: float, *, measured: bool = True) -> None:
        self.meter.begin_step(self.now, spans, decodes, measured=measured)
        self.now += seconds
        self.meter.end_step(self.now)
        self.now += 0.01


def mixed_work(engine: Engine, prompts: int = 60) -> None:
    for index in range(prompts):
        engine.compute((300, 1800, 4000, 9000)[index % 4], decodes=index % 5)


def test_nothing_is_known_before_the_first_prompt():
    meter = PrefillMeter()
    assert meter.speed is None
    assert meter.seconds(0, 1000) is None
    assert meter.tokens_per_s is None


def test_one_prompt_gives_a_first_speed():
    meter = PrefillMeter()
    Engine(meter).compute(2000)
    assert meter.seconds(0, 2000) == pytest.approx(step_seconds(0, 2000), rel=0.01)


def test_speed_and_the_growth_of_attention_are_found_exactly_without_noise():
    meter = PrefillMeter()
    mixed_work(Engine(meter))
    assert meter.speed is not None
    assert meter.speed.seconds_per_token == pytest.approx(EACH, rel=0.02)
    assert meter.speed.seconds_per_token_position == pytest.approx(POSITION, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_outliers_leave_the_prediction_within_a_quarter(seed: int):
    meter = PrefillMeter()
    mixed_work(Engine(meter, noise=0.1, outliers=0.1, seed=seed))
    for prompt in (1800, 9000):
        exact = EACH * prompt + POSITION * prompt * prompt / 2
        assert meter.seconds(0, prompt) == pytest.approx(exact, rel=0.25)


@pytest.mark.parametrize("seed", range(5))
def test_on_a_machine_that_others_use_it_is_the_median_that_counts_and_not_the_fastest(seed: int):
    meter = PrefillMeter()
    mixed_work(Engine(meter, noise=1.0, seed=seed))
    exact = step_seconds(0, 1800)
    assert exact / 2 < meter.seconds(0, 1800) < exact * 2


def test_a_slow_first_step_is_forgiven_with_the_second():
    meter = PrefillMeter()
    engine = Engine(meter)
    engine.step([(0, 2000)], 0, 60.0)
    engine.compute(2000)
    assert meter.seconds(0, 2000) == pytest.approx(step_seconds(0, 2000), rel=0.01)


def test_an_engine_that_becomes_slower_for_good_is_believed():
    meter = PrefillMeter()
    engine = Engine(meter)
    mixed_work(engine)
    engine.slower = 3.0
    mixed_work(engine)
    assert meter.seconds(0, 1800) == pytest.approx(3 * (1800 * EACH + POSITION * 1800**2 / 2), rel=0.1)


def test_prompts_of_one_length_do_not_invent_a_growth_with_the_position():
    meter = PrefillMeter()
    engine = Engine(meter, noise=0.1)
    for _ in range(60):
        engine.compute(1500)
    assert meter.seconds(0, 100_000) == pytest.approx(step_seconds(0, 1500) / 1500 * 100_000, rel=0.5)


def test_growth_that_is_not_seen_is_taken_from_an_earlier_engine():
    meter = PrefillMeter(prior=PrefillSpeed(EACH, POSITION))
    engine = Engine(meter, noise=0.02)
    for _ in range(20):
        engine.compute(700)
    assert meter.seconds(0, 50_000) == pytest.approx(EACH * 50_000 + POSITION * 50_000**2 / 2, rel=0.3)


def test_what_an_earlier_engine_measured_holds_until_the_first_step():
    meter = PrefillMeter(prior=PrefillSpeed(5.0))
    assert meter.seconds(0, 10) == 50.0
    assert meter.measured is None
    mixed_work(Engine(meter))
    assert meter.seconds(0, 1800) == pytest.approx(step_seconds(0, 1800), rel=0.1)
    assert meter.measured == meter.speed


def test_a_given_speed_is_believed_against_every_measurement():
    meter = PrefillMeter(given=PrefillSpeed(5.0))
    mixed_work(Engine(meter))
    assert meter.seconds(0, 10) == 50.0
    assert meter.tokens_per_s == pytest.approx(0.2)


def test_steps_that_overlap_are_not_counted_twice():
    """Step n + 1 is begun while step n runs: it takes from the end of n to its own."""
    meter = PrefillMeter()
    for index in range(20):
        meter.begin_step(index * 0.2, [(0, 1000)], 0)
        if index:
            meter.end_step(index * 0.2 + 0.15)
    assert meter.seconds(0, 1000) == pytest.approx(0.2, rel=0.01)


def test_decoding_and_waiting_steps_tell_nothing():
    meter = PrefillMeter()
    engine = Engine(meter)
    engine.step([], 0, 0.002)
    engine.step([], 64, 0.03)
    engine.step([(0, 16)], 0, 0.03)
    engine.step([(0, 100)], 200, 0.03)
    engine.step([(5000, 5006)] * 64, 0, 0.05)  # drafts are verified
    engine.step([(0, 2000)], 0, 9.0, measured=False)
    assert meter.speed is None


def test_an_end_without_a_begin_and_begins_without_an_end_are_harmless():
    meter = PrefillMeter()
    meter.end_step(1.0)
    for index in range(100):
        meter.begin_step(float(index), [(0, 1000)], 0)
    mixed_work(Engine(meter))
    assert meter.speed is not None


def test_decodes_beside_a_prompt_are_not_taken_for_slow_prefill():
    meter = PrefillMeter()
    engine = Engine(meter)
    for index in range(60):
        engine.compute((500, 1000, 2000)[index % 3], decodes=200)
    assert meter.speed is not None
    assert meter.speed.seconds_per_token == pytest.approx(EACH, rel=0.1)


def test_a_step_costs_the_scheduler_less_than_a_millisecond():
    """At rest some 60 microseconds with a fit, 2 without; the bound leaves room for a busy machine."""
    meter = PrefillMeter()
    engine = Engine(meter, noise=0.1)
    mixed_work(engine)
    times = []
    for _ in range(200):
        begun = time.perf_counter()
        engine.compute(2048)
        times.append(time.perf_counter() - begun)
    assert sorted(times)[len(times) // 2] < 1e-3


@given(
    st.lists(st.tuples(st.integers(1, 100_000), st.integers(0, 100_000), st.floats(1e-6, 1e4)), min_size=1, max_size=80)
)
def test_whatever_is_measured_gives_finite_costs_that_are_not_negative(steps: list[tuple[int, int, float]]):
    meter, now = PrefillMeter(), 0.0
    for tokens, begin, seconds in steps:
        meter.begin_step(now, [(begin, begin + tokens)], 0)
        now += seconds
        meter.end_step(now)
    speed = meter.speed  # PrefillSpeed itself refuses what is negative or not finite
    assert speed is None or speed.seconds(0, 1_000_000) >= 0


def test_a_fit_finds_a_fixed_part_beside_the_rate():
    fit = LinearFit((0.0, 0.0), window=16)
    for size in (1e6, 2e6, 5e6, 1e7) * 4:
        fit.add((size, 1.0), 0.005 + size / 1e9)
        fit.fit()
    for _ in range(20):
        fit.fit()
    assert fit.coefficients == pytest.approx([1e-9, 0.005], rel=0.05)


def test_a_speed_is_remembered_for_the_next_engine(tmp_path: Path):
    path = speed_file(tmp_path / "cache", "ab" * 32, "cpu", 2)
    assert recall(path) is None
    remember(path, PrefillSpeed(1.5e-4, 3e-9))
    remember(path, PrefillSpeed(2.5e-4, 3e-9))
    assert recall(path) == PrefillSpeed(2.5e-4, 3e-9)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing half-written is left"


def test_another_device_or_thread_count_is_another_file(tmp_path: Path):
    names = {speed_file(tmp_path, *parts) for parts in (("a", "cpu", 2), ("a", "cpu", 4), ("b", "cpu", 2))}
    assert len(names) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"version": 2, "seconds_per_token": 1.0, "seconds_per_token_position": 0.0}',
        b'{"version": 1, "seconds_per_token": "1"}',
        b'{"version": 1, "seconds_per_token": 0, "seconds_per_token_position": 0}',
        b'{"version": 1, "seconds_per_token": -1, "seconds_per_token_position": 0}',
        b'{"version": 1, "seconds_per_token": NaN, "seconds_per_token_position": 0}',
        b'{"version": 1, "seconds_per_token": Infinity, "seconds_per_token_position": 0}',
        b'{"version": 1, "seconds_per_token": 1, "seconds_per_token_position": null}',
        b'{"version": 1, "seconds_per_token": 1, "seconds_per_token_position": ' + b"9" * 5000 + b"}",
        b"[" * 4000,
    ],
)
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, content: bytes):
    path = tmp_path / "speed.json"
    path.write_bytes(content)
    assert recall(path) is None


def test_a_directory_that_cannot_be_written_is_no_fault(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    remember(tmp_path / "file" / "speed.json", PrefillSpeed(1.0))
    remember(tmp_path, PrefillSpeed(1.0))
    assert json.loads("[]") == [file for file in tmp_path.iterdir() if file.name != "file"]
