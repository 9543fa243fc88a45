"""When a request is tried again. Decisions are pure; `Retrying.run` carries them out.

A pause is drawn from zero up to a bound that doubles (full jitter), so that clients that failed together do not come
back together. The budget keeps a store that is down from being asked several times as much as one that is up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from kvstore_s3.config import Settings
from kvstore_s3.errors import KVStoreError, StoreUnavailableError
from kvstore_s3.metrics import Count

T = TypeVar("T")

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0


class RetryBudget:
    """A token bucket: a request earns `ratio` of a token, a retry spends one, and `burst` are there at the start."""

    def __init__(self, ratio: float, burst: float = 10.0) -> None:
        self._ratio = ratio
        self._burst = burst
        self._tokens = burst

    def earn(self) -> None:
        self._tokens = min(self._burst, self._tokens + self._ratio)

    def spend(self) -> bool:
        """Whether a retry may be made; if so, it is paid for."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def pause_s(failures: int, draw: float, least: float = 0.0) -> float:
    """Seconds to wait after so many `failures` (1 or more): `draw` (in [0, 1)) of a bound that doubles, or `least`."""
    bound = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (failures - 1))
    return max(draw * bound, least)


class Retrying:
    """Runs attempts of requests until one succeeds, or may not be repeated.

    `explain` maps what an attempt raised (one of `foreign`) to our error, and says for how many seconds the server
    asked to be left alone (0: it did not say). `draw` yields numbers in [0, 1).
    """

    def __init__(
        self,
        settings: Settings,
        foreign: tuple[type[Exception], ...],
        explain: Callable[[Exception], tuple[KVStoreError, float]],
        *,
        draw: Callable[[], float],
        count: Count,
    ) -> None:
        self._attempts = settings.max_attempts
        self._longest_s = settings.request_deadline_s
        self._budget = RetryBudget(settings.retry_ratio)
        self._foreign = foreign
        self._explain = explain
        self._draw = draw
        self._count = count

    async def run(self, attempt: Callable[[], Awaitable[T]], *, again: Callable[[KVStoreError], bool]) -> T:
        """Return what `attempt` returns. Its last error, mapped, is raised where none is left, or `again` says no."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._longest_s
        self._budget.earn()
        failures = 0
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    return await attempt()
            except self._foreign as error:
                mapped, asked_s = self._explain(error)
                failures += 1
                wait = pause_s(failures, self._draw(), asked_s)
                if (
                    failures >= self._attempts
                    or not isinstance(mapped, StoreUnavailableError)
                    or not again(mapped)
                    or loop.time() + wait >= deadline
                    or not self._budget.spend()
                ):
                    raise mapped from error
            self._count("retries", 1)
            await asyncio.sleep(wait)
