"""Progress on stderr: a bar with rate and remaining time on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from kvstore_s3.cli.output import format_seconds, say

LINE_INTERVAL_S = 5.0
"""Seconds between two lines where stderr is no terminal."""


class WorkProgress:
    """Counts `unit`s of work from 0 to `total`. Used as a context manager.

    Work that ends within `patience_s` seconds leaves no line where stderr is no terminal; else the last state is shown.
    """

    def __init__(self, verb: str, total: int, unit: str, *, patience_s: float = 0.0) -> None:
        self._verb, self._total, self._unit = verb, total, unit
        self._done = 0
        self._label = ""
        self._start = time.monotonic()
        self._first_line = self._next_line = self._start + patience_s  # with no patience, the first work that is done
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console)
            self._bar.start()
            self._task = self._bar.add_task(self._unit + "s", total=self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._total and time.monotonic() >= self._first_line:
            self._print_line()

    def advance(self, amount: int, label: str | None = None) -> None:
        """`amount` more units are done; `label` says what is being worked on."""
        self._done += amount
        self._label = self._label if label is None else label
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=escape(self._describe()))
        elif amount and self._done < self._total and time.monotonic() >= self._next_line:
            self._print_line()

    def skip(self, amount: int) -> None:
        """`amount` units turned out to need no work; below zero, more are needed."""
        self._total -= amount
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)

    def say(self, message: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is None:
            say(message)
        else:
            self._bar.console.print(f"kvstore-s3: {message}", markup=False, highlight=False, soft_wrap=True)

    def _describe(self) -> str:
        seconds = time.monotonic() - self._start
        parts = [f"{self._unit}s"]
        if self._done and seconds > 0.05:
            rate = self._done / seconds
            parts.append(f"{rate:,.0f} {self._unit}s/s")
            left = max(self._total - self._done, 0)
            if left:
                parts.append(f"{format_seconds(left / rate)} left")
        if self._label:
            parts.append(self._label)
        return ", ".join(parts)

    def _print_line(self) -> None:
        self._next_line = time.monotonic() + LINE_INTERVAL_S
        sys.stderr.write(f"{self._verb}: {self._done:,}/{self._total:,} {self._describe()}\n")
        sys.stderr.flush()
