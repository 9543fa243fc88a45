"""The simulator of links: what the planner and the order of reads gain must not be lost again."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from streaming import compare_policies
from streaming_links import HISTORY_S, Link, make_link
from streaming_plot import draw
from streaming_shared import compare_sharing
from streaming_single import LEVEL_BITS, LOSSLESS_BITS

SEEDS = 40


def test_a_link_moves_what_its_rates_say() -> None:
    link = Link(np.full(int((HISTORY_S + 60) / 0.02), 100.0))
    assert link.finish(1.0, 250.0) == pytest.approx(3.5)
    assert link.moved(1.0, 3.5) == pytest.approx(250.0)
    assert link.finish(59.0, 1000.0) == pytest.approx(69.0)  # the last rate holds beyond the trace


def test_the_end_of_a_transfer_fits_what_moved() -> None:
    link = make_link("burst", np.random.default_rng(1), 1e8, 1e9)
    assert link.moved(0.3, link.finish(0.3, 5e8)) == pytest.approx(5e8)


def test_the_planner_is_close_to_the_optimum_and_better_than_any_fixed_choice() -> None:
    for trace, rows in compare_policies(SEEDS, LOSSLESS_BITS, deadline=False).items():
        ours = rows["replanned, watched"]["mean_s"]
        assert ours < min(rows["load all"]["mean_s"], rows["recompute all"]["mean_s"]), trace
        assert ours <= 1.25 * rows["offline optimum"]["mean_s"], trace


def test_levels_meet_nearly_every_deadline_that_can_be_met() -> None:
    for trace, rows in compare_policies(SEEDS, LEVEL_BITS, deadline=True).items():
        ours, best = rows["replanned, watched"], rows["offline optimum"]
        assert ours["met"] >= best["met"] - 0.1, trace
        assert ours["level"] >= best["level"] - 0.25, trace
        assert all(ours["met"] >= rows[f"all at level {level}"]["met"] for level in (2, 3)), trace


def test_urgency_adds_less_time_than_equal_shares_and_starves_nobody() -> None:
    rows = compare_sharing(400)
    for row in rows:
        if row["order"] == "urgency":
            assert row["gain_over_equal_shares"] >= 1.2
            twins = [it for it in rows if (it["engine"], it["utilisation"]) == (row["engine"], row["utilisation"])]
            worst = {it["order"]: it["worst_s"] for it in twins}
            assert worst["urgency"] <= worst["least left first"]
            assert worst["urgency"] <= 1.1 * worst["equal shares"]


def test_the_same_seeds_give_the_same_figures_and_a_plot() -> None:
    results = [
        {
            "lossless": compare_policies(2, LOSSLESS_BITS, deadline=False),
            "levels": compare_policies(2, LEVEL_BITS, deadline=True),
            "sharing": compare_sharing(20),
        }
        for _ in range(2)
    ]
    assert results[0] == results[1]
    assert draw(results[0]).startswith("<svg")
