"""When to leave a failing store alone, and when to try it again. Pure: the time is an argument, in monotonic seconds.

Closed: requests pass, and enough failures in a row open it. Open: none passes until its pause is over. Then it is half
open: one request is let through as a trial; if it succeeds the breaker closes, if it fails the next pause is longer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

_LONGEST = 30
"""Longest pause, in first pauses."""
_JITTER = 0.25
"""Share by which a pause is longer or shorter, so that many readers of one store do not come back at once."""


class Ticket(NamedTuple):
    """What a request that was let through hands back with its outcome. `era`: how often the state had changed."""

    era: int
    trial: bool


class Breaker:
    """Closed, open or half open. Every ticket is given back once: to `succeed`, `fail` or `release`.

    Outcomes of requests that began before the state last changed say nothing new and are ignored, but a trial that
    succeeds closes it whenever it ends. A breaker that opens again soon after it closed goes on with longer pauses.
    """

    def __init__(self, *, failures: int, pause_s: float, spread: Callable[[], float] = random.random) -> None:
        """`spread` gives numbers from 0 to 1 for the jitter."""
        self._limit = failures
        self._first_pause = pause_s
        self._spread = spread
        self._failed = 0
        self._era = 0
        self._closed = True
        self._trying = False
        self._doublings = 0
        self._calm_from = float("-inf")
        self.retry_at = 0.0
        """When a trial is let through; of use while it is not closed."""
        self.reason = ""
        """The last failure that counted."""

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def trying(self) -> bool:
        """Whether the one trial is under way."""
        return self._trying

    def passes(self, now: float) -> bool:
        """Whether `admit` would let a request through."""
        return self._closed or (now >= self.retry_at and not self._trying)

    def admit(self, now: float) -> Ticket | None:
        """Let a request through, as the one trial if it is half open; None: it is not to be made."""
        if not self.passes(now):
            return None
        self._trying = not self._closed
        return Ticket(self._era, trial=self._trying)

    def admit_probe(self) -> Ticket:
        """Let a request through in any state; where it is not closed, as a trial."""
        return Ticket(self._era, trial=not self._closed)

    def succeed(self, ticket: Ticket, now: float) -> bool:
        """The store answered. True: this closed the breaker."""
        if self._closed:
            if ticket.era == self._era:
                self._failed = 0
            return False
        if not ticket.trial:
            return False
        self._change(closed=True)
        # The wait that was just over, once more: whoever fails again within it has not recovered.
        self._calm_from = now + self._pause()
        return True

    def fail(self, ticket: Ticket, now: float, reason: str, *, at_once: bool = False) -> bool:
        """The store failed. True: this opened the breaker, at the limit or `at_once`."""
        if ticket.era != self._era:
            return False
        self.reason = reason
        if not self._closed:
            self._open(now, longer=True)
            return False
        self._failed += 1
        return (at_once or self._failed >= self._limit) and self.trip(now, reason)

    def trip(self, now: float, reason: str) -> bool:
        """Open it, whatever was counted. True: it was closed."""
        if not self._closed:
            return False
        self.reason = reason
        self._open(now, longer=now < self._calm_from)
        return True

    def release(self, ticket: Ticket) -> None:
        """The request ended without saying anything about the store: cancelled, or never made."""
        if ticket.trial and ticket.era == self._era:
            self._trying = False

    def _open(self, now: float, *, longer: bool) -> None:
        self._doublings = self._doublings + 1 if longer else 0
        self._change(closed=False)
        self.retry_at = now + self._pause() * (1 + _JITTER * (2 * self._spread() - 1))

    def _pause(self) -> float:
        return self._first_pause * min(2.0 ** min(self._doublings, 10), _LONGEST)

    def _change(self, *, closed: bool) -> None:
        self._closed = closed
        self._era += 1
        self._failed = 0
        self._trying = False
