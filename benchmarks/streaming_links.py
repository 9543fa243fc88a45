"""Links whose rate changes while a load runs, as the streaming simulator sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

STEP_S = 0.02
HISTORY_S = 2.0
HORIZON_S = 60.0
NOISE = 0.15
"""Standard deviation of the logarithm of the rate from step to step."""


class Link:
    """A rate for each step of time from `-HISTORY_S` on, in bytes/s; the last one holds for ever."""

    def __init__(self, rates: NDArray[np.float64]) -> None:
        self._rates = rates
        self._moved = np.concatenate([[0.0], np.cumsum(rates * STEP_S)])

    def moved(self, start: float, end: float) -> float:
        """Bytes that pass between two moments."""
        return self._position(end) - self._position(start)

    def finish(self, start: float, size: float) -> float:
        """When `size` bytes that are sent from `start` on have passed."""
        target = self._position(start) + size
        if target >= self._moved[-1]:
            return HORIZON_S + (target - self._moved[-1]) / self._rates[-1]
        step = int(np.searchsorted(self._moved, target, side="right")) - 1
        return -HISTORY_S + step * STEP_S + (target - self._moved[step]) / self._rates[step]

    def _position(self, moment: float) -> float:
        steps = (moment + HISTORY_S) / STEP_S
        step = min(int(steps), len(self._rates) - 1)
        return float(self._moved[step] + (steps - step) * STEP_S * self._rates[step])


Shape = Callable[[np.random.Generator, NDArray[np.float64]], NDArray[np.float64]]


def _steady(generator: np.random.Generator, moments: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.ones_like(moments)


def _step(generator: np.random.Generator, moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """Another rate from some moment in the first second on: a fifth to a half of it, or two to four times as much."""
    factor = generator.uniform(0.2, 0.5) if generator.random() < 0.5 else generator.uniform(2, 4)
    return np.where(moments < generator.uniform(0, 1), 1.0, factor)


def _burst(generator: np.random.Generator, moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """Other traffic takes 85 % of the link, twice a second, for 50 to 250 ms."""
    shape = np.ones_like(moments)
    moment = moments[0]
    while (moment := moment + generator.exponential(0.5)) < moments[-1]:
        shape[(moments >= moment) & (moments < moment + generator.uniform(0.05, 0.25))] = 0.15
    return shape


def _collapse(generator: np.random.Generator, moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """3 % of the rate from some moment in the first second on."""
    return np.where(moments < generator.uniform(0, 1), 1.0, 0.03)


TRACES: Mapping[str, Shape] = {"steady": _steady, "step": _step, "burst": _burst, "collapse": _collapse}


def make_link(trace: str, generator: np.random.Generator, slowest: float, fastest: float) -> Link:
    """A link of that trace whose first rate is drawn from `slowest` to `fastest` bytes/s, logarithmically even."""
    moments = np.arange(-HISTORY_S, HORIZON_S, STEP_S)
    base = np.exp(generator.uniform(np.log(slowest), np.log(fastest)))
    noise = np.exp(generator.normal(0, NOISE, len(moments)))
    return Link(base * TRACES[trace](generator, moments) * noise)
