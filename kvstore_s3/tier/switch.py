"""A tier that fails is left alone for a while, and tried again by itself. Pure: time is an argument."""

from __future__ import annotations


class Switch:
    """Off after `failures` failures in a row, for `pause_s` seconds, twice as long after each further failure."""

    def __init__(self, *, failures: int, pause_s: float = 5.0, longest_s: float = 300.0) -> None:
        self._allowed_failures = failures
        self._first_pause_s = pause_s
        self._longest_s = longest_s
        self._failures = 0
        self._pause_s = pause_s
        self._off_until = float("-inf")

    def is_on(self, now: float) -> bool:
        return now >= self._off_until

    def worked(self) -> None:
        self._failures = 0
        self._pause_s = self._first_pause_s

    def failed(self, now: float) -> None:
        """A failure at `now`. Those of work that began before the switch went off do not make the pause longer."""
        self._failures += 1
        if self._failures >= self._allowed_failures and self.is_on(now):
            self._off_until = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, self._longest_s)
