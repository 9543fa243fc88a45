"""The benchmarks of the tiers: their peers do what they say, and a small run has all its rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from tier_policy import POLICIES, TRACES, Lru, Sieve, hit_rate, optimum, prompts_of
from tiers import measure


def test_lru_and_fifo_differ_in_what_they_keep() -> None:
    asked = [(1, 1), (2, 1), (1, 1), (3, 1), (1, 1)]
    assert [Lru(2).ask(*each) for each in asked[:1]] == [False]
    lru, fifo = Lru(2), Lru(2, touch=False)
    assert [lru.ask(*each) for each in asked] == [False, False, True, False, True]
    assert [fifo.ask(*each) for each in asked] == [False, False, True, False, False]


def test_sieve_spares_what_was_visited() -> None:
    sieve = Sieve(2)
    assert [sieve.ask(name, 1) for name in (1, 2, 1, 3, 1, 2)] == [False, False, True, False, True, False]


@pytest.mark.parametrize("trace", TRACES)
def test_no_policy_beats_the_optimum_and_ours_beats_fifo(trace: str) -> None:
    asked = [chunk for prompt in prompts_of(trace, 8000, seed=5) for chunk in prompt]
    capacity = sum(dict(asked).values()) // 20
    rates = {name: hit_rate(policy(capacity).ask, asked) for name, policy in POLICIES.items()}
    assert max(rates.values()) < optimum(asked, capacity)
    assert rates["ours (S3-FIFO)"] > rates["FIFO"]


def test_a_small_run_measures_every_way_of_reading_and_writing(tmp_path: Path) -> None:
    result = measure(tmp_path, mib=32, rounds=1)
    assert {"ours", "aiofiles", "limit"} <= set(result["rows"]["read"]) & set(result["rows"]["write"])
    assert all(row["cpu_s_per_gb"] > 0 for rows in result["rows"].values() for row in rows.values())
    assert list(tmp_path.iterdir()) == []
