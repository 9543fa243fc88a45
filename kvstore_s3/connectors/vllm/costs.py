"""What things cost, learned from how long they took: prefill by position, transfers by size. Pure but for one file.

Time comes as an argument. Objects here are for one thread, the scheduler's; calls take some 10 microseconds.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.planner import PrefillSpeed

WINDOW = 48
"""Samples that are remembered. A lasting change is believed once it makes up half of them."""

ENOUGH = 8
"""Samples from which on more than one coefficient is fitted; fewer could be explained in too many ways."""

_NO_NOISE = 0.02
"""Relative residuals below this are not told apart: no sample rules the fit because it was met exactly."""

_TINY_S = 1e-9
"""No sample is expected to take less: shares of it are made."""

_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution, from the median of the absolute deviations."""

_RIDGE = 0.003
"""Pull of the coefficients behind the first towards zero, as a share of their own weight: what the samples do not tell
apart is the first one's."""

_SURE = 2.0
"""Standard errors by which a coefficient behind the first must differ from what was known before to be believed: the
one of positions is used far beyond those it was seen at."""

_MOST_UNENDED = 16
"""Steps under way at once. More means that ends were not told, and the oldest are forgotten."""

_LEAST_TOKENS = 32
"""Steps with fewer prompt tokens tell nothing of prefill."""

_LEAST_SPAN = 16
"""Fewer tokens of a request in a step may be drafts that are verified: they count as decodes."""

_MAX_FILE_BYTES = 4096

Floats = NDArray[np.float64]


class LinearFit:
    """`seconds = features @ coefficients`, no coefficient below zero, from the last `WINDOW` samples.

    Least absolute residuals relative to what was expected (iteratively reweighted least squares): many samples may be
    far off without moving it. Not relative to what was measured: fast samples would then count for more than slow ones.
    The first feature is the one that counts. The others are as `known` until there are `ENOUGH` samples, and later as
    far as these allow it: between two standard errors below and above what was found.
    """

    def __init__(self, known: Sequence[float], *, window: int = WINDOW) -> None:
        """`known`: the coefficients to begin with, the first of which is not used; `window` samples are remembered."""
        self._known: Floats = np.array(known, dtype=np.float64)
        self._features = np.zeros((window, len(known)))
        self._seconds = np.zeros(window)
        self.samples = 0
        self.coefficients: Floats = self._known.copy()

    def add(self, features: Sequence[float], seconds: float) -> None:
        """One sample; its first feature and `seconds` are above zero."""
        at = self.samples % len(self._seconds)
        self._features[at], self._seconds[at] = features, seconds
        self.samples += 1

    def clear(self) -> None:
        """Forget all samples."""
        self.samples = 0
        self.coefficients = self._known.copy()

    def fit(self) -> None:
        """Bring `coefficients` up to date, by one step of reweighting from the last ones: call it again and again."""
        features, seconds = self.window()
        if self.samples < ENOUGH:
            rates = np.sort(np.maximum(seconds - features[:, 1:] @ self._known[1:], 0.0) / features[:, 0])
            self.coefficients[0] = rates[(len(rates) - 1) // 2]  # of two the faster: what goes wrong is slow
            return
        fitted = np.maximum(features @ self.coefficients, _TINY_S)
        off = np.abs(seconds / fitted - 1)
        features, seconds = features / fitted[:, None], seconds / fitted
        weighted = features / np.maximum(off, _NO_NOISE)[:, None]  # makes squares of residuals absolute ones
        found = _solve(weighted.T @ features, weighted.T @ seconds)
        doubt = _SURE * _standard_errors(features, off)[1:]
        rest = np.minimum(np.maximum(self._known[1:], found[1:] - doubt), found[1:] + doubt)
        each = weighted[:, 0] @ (seconds - features[:, 1:] @ rest) / (weighted[:, 0] @ features[:, 0])
        self.coefficients[0], self.coefficients[1:] = max(float(each), 0.0), rest

    def window(self) -> tuple[Floats, Floats]:
        """Features [samples, features] and seconds [samples] of the samples that are remembered."""
        count = min(self.samples, len(self._seconds))
        return self._features[:count], self._seconds[:count]


def _solve(products: Floats, targets: Floats) -> Floats:
    """Least squares with no coefficient below zero: the most negative one is set to zero, one by one."""
    _add_ridge(products)
    solution: Floats = np.asarray(np.linalg.solve(products, targets), dtype=np.float64)
    free = list(range(len(products)))
    while len(free) > 1 and solution.min() < 0:
        del free[int(np.argmin(solution[free]))]
        solution = np.zeros(len(products))
        solution[free] = np.linalg.solve(products[np.ix_(free, free)], targets[free])
    return solution.clip(min=0.0)


def _standard_errors(features: Floats, off: Floats) -> Floats:
    """Of the coefficients, from how far `off` the samples are, in units of what was expected."""
    products = features.T @ features
    _add_ridge(products)
    scatter = _TO_SIGMA * np.sort(off)[len(off) // 2]
    errors: Floats = scatter * np.sqrt(np.diagonal(np.linalg.inv(products)))
    return errors


def _add_ridge(products: Floats) -> None:
    first = products[0, 0]
    products.flat[:: len(products) + 1] *= 1 + _RIDGE
    products[0, 0] = first


@dataclass(slots=True)
class _Step:
    begun: float
    tokens: int
    positions: float
    measured: bool


class PrefillMeter:
    """How fast the engine computes prompts, from the times of its steps.

    A step takes a fixed time, a time for each token and more for each position before it (attention). Steps may be
    begun before earlier ones have ended, in which case a step's time counts from the end of the one before it. Steps of
    mostly decoding tell nothing and are skipped; a few decodes beside a prompt count as tokens of it.
    """

    def __init__(self, *, given: PrefillSpeed | None = None, prior: PrefillSpeed | None = None) -> None:
        """`given` is believed instead of any measurement; `prior`, what an earlier engine measured, until there is one.

        Where the steps do not tell how attention grows with the position, that is taken from `prior` for good.
        """
        self._given = given
        self._prior = prior
        self._fit = LinearFit((0.0, 0.0, prior.seconds_per_token_position if prior else 0.0))
        """Features: tokens, one, sum of the tokens' positions."""
        self._steps: deque[_Step] = deque(maxlen=_MOST_UNENDED)
        self._last_end = -np.inf
        self._measured: PrefillSpeed | None = None

    @property
    def speed(self) -> PrefillSpeed | None:
        """What is believed now; None: nothing is known yet."""
        return self._given or self._measured or self._prior

    @property
    def measured(self) -> PrefillSpeed | None:
        """What this engine's own steps say, to be remembered; None until there are some."""
        return self._measured if self._fit.samples >= ENOUGH else None

    @property
    def tokens_per_s(self) -> float | None:
        """Prompt tokens per second at the beginning of a prompt, for people to see."""
        speed = self.speed
        return 1 / speed.seconds_per_token if speed is not None and speed.seconds_per_token > 0 else None

    def seconds(self, begin: int, end: int) -> float | None:
        """Seconds to compute the tokens at positions `begin` to `end` of a prompt; None: not known."""
        speed = self.speed
        return None if speed is None else speed.seconds(begin, end)

    def begin_step(self, now: float, spans: Sequence[tuple[int, int]], decodes: int, *, measured: bool = True) -> None:
        """The engine begins a step: `spans` are the positions of the prompt tokens that it computes, by request.

        `decodes` requests compute one token. `measured` False: the step will wait for something else, such as a load
        by layers, and its time tells nothing.
        """
        tokens, positions = 0, 0.0
        for begin, end in spans:
            if end - begin < _LEAST_SPAN:
                decodes += end - begin
            else:
                tokens += end - begin
                positions += (end - begin) * (begin + end) / 2
        worth = measured and tokens >= _LEAST_TOKENS and tokens >= decodes
        self._steps.append(_Step(now, tokens + decodes, positions, worth))

    def end_step(self, now: float) -> None:
        """The oldest step that was begun has ended."""
        if not self._steps:
            return
        step = self._steps.popleft()
        seconds = now - max(step.begun, self._last_end)
        self._last_end = now
        if step.measured and seconds > 0:
            self._fit.add((step.tokens, 1.0, step.positions), seconds)
            if self._fit.samples < 2 * ENOUGH or self._fit.samples % 4 == 0:
                self._learn()

    def _learn(self) -> None:
        self._fit.fit()
        each, _, attention = map(float, self._fit.coefficients)
        if each > 0:
            self._measured = PrefillSpeed(each, attention)


def speed_file(cache_dir: Path, *parts: object) -> Path:
    """Where the speed of an engine is remembered; `parts` say which: namespace, device, threads, ranks."""
    name = blake3("\n".join(map(str, parts)).encode()).hexdigest()[:32]
    return cache_dir / "prefill" / f"{name}.json"


def remember(path: Path, speed: PrefillSpeed) -> None:
    """Write `speed` for the next engine, in one move. Blocking. Not being able to is no fault: it is measured again."""
    document = {
        "version": 1,
        "seconds_per_token": speed.seconds_per_token,
        "seconds_per_token_position": speed.seconds_per_token_position,
    }
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                json.dump(document, file)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


def recall(path: Path) -> PrefillSpeed | None:
    """What an earlier engine remembered; None where there is nothing, or nothing that can be understood. Blocking."""
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(_MAX_FILE_BYTES))
        if document["version"] != 1:
            return None
        each, position = document["seconds_per_token"], document["seconds_per_token_position"]
        return PrefillSpeed(float(each), float(position)) if each > 0 else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, InvalidArgumentError):
        return None
