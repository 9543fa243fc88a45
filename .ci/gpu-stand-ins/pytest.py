"""Runs the tests of tests/device where there is no pytest: `python -m pytest -c INI -q FILE... [-k WORDS] [-x]`.

It knows what they use: fixtures of each scope, parametrize, skipif, usefixtures, tests that are `async def`, and the
fixtures tmp_path, monkeypatch, caplog and pytestconfig. Whatever else they ask for is an error. A failed `assert` is
shown by its line alone. This file is what tests import; run_tests.py runs them.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import pkgutil
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MISSING: Any = object()


class TestSkippedError(BaseException):
    pass


class TestFailedError(AssertionError):
    pass


def skip(reason: str, *, allow_module_level: bool = True) -> None:
    raise TestSkippedError(reason)


def fail(reason: str) -> None:
    raise TestFailedError(reason)


def importorskip(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TestSkippedError(f"could not import {name!r}: {error}") from error


class Raised:
    value: BaseException


@contextmanager
def raises(kinds: Any, *, match: str | None = None) -> Iterator[Raised]:
    caught = Raised()
    try:
        yield caught
    except kinds as error:
        caught.value = error
        if match is not None and not re.search(match, str(error)):
            raise TestFailedError(f"{match!r} is not found in {str(error)!r}") from error
    else:
        raise TestFailedError(f"did not raise {kinds}")


@dataclass(frozen=True)
class Fixture:
    make: Callable[..., Any]
    scope: str
    autouse: bool
    params: Sequence[Any] = ()
    ids: Any = None


def fixture(
    function: Any = None, *, scope: str = "function", autouse: bool = False, params: Iterable[Any] = (), ids: Any = None
) -> Any:
    """With `params` each test is run for each, which the fixture finds in `request.param`."""
    choices = tuple(params)
    if choices and scope != "function":
        raise TypeError("this stand-in for pytest knows params of fixtures for one test alone")
    if function is None:
        return lambda function: Fixture(function, scope, autouse, choices, ids)
    return Fixture(function, scope, autouse)


@dataclass(frozen=True)
class Mark:
    name: str
    given: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, function: Any) -> Any:
        function.marks = [self, *getattr(function, "marks", [])]
        return function


class _Marks:
    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in ("parametrize", "skipif", "usefixtures", "timeout", "server", "engine", "kernels"):
            raise AttributeError(f"this stand-in for pytest knows no mark {name!r}")

        def make(*given: Any, **named: Any) -> Any:
            bare = len(given) == 1 and not named and inspect.isfunction(given[0])
            return Mark(name)(given[0]) if bare else Mark(name, given, named)

        return make


mark = _Marks()


class MonkeyPatch:
    def __init__(self) -> None:
        self._undo = ExitStack()

    @classmethod
    @contextmanager
    def context(cls) -> Iterator[MonkeyPatch]:
        patch = cls()
        with patch._undo:
            yield patch

    def setattr(self, holder: Any, name: Any, value: Any = _MISSING) -> None:
        """`holder` and a name, or both in one string."""
        if value is _MISSING:
            place, _, attribute = holder.rpartition(".")
            holder, name, value = pkgutil.resolve_name(place), attribute, name
        own = vars(holder).get(name, _MISSING)
        getattr(holder, name)
        setattr(holder, name, value)
        undo = (delattr, holder, name) if own is _MISSING else (setattr, holder, name, own)
        self._undo.callback(*undo)

    def setenv(self, name: str, value: str) -> None:
        self._keep(name)
        os.environ[name] = value

    def delenv(self, name: str) -> None:
        self._keep(name)
        del os.environ[name]

    def _keep(self, name: str) -> None:
        old = os.environ.get(name)
        self._undo.callback(os.environ.pop, name, None)
        if old is not None:
            self._undo.callback(os.environ.__setitem__, name, old)


class LogCaptureFixture(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.records]

    @property
    def text(self) -> str:
        """The messages alone, a line each."""
        return "".join(f"{message}\n" for message in self.messages)

    def clear(self) -> None:
        self.records.clear()

    @contextmanager
    def at_level(self, level: int, logger: str | None = None) -> Iterator[None]:
        target = logging.getLogger(logger)
        old = target.level
        target.setLevel(level)
        try:
            yield
        finally:
            target.setLevel(old)


@fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pytest-") as folder:
        yield Path(folder)


@fixture
def monkeypatch() -> Iterator[MonkeyPatch]:
    with MonkeyPatch.context() as patch:
        yield patch


@fixture
def caplog() -> Iterator[LogCaptureFixture]:
    handler, root = LogCaptureFixture(), logging.getLogger()
    root.addHandler(handler)
    try:
        yield handler
    finally:
        root.removeHandler(handler)


if __name__ == "__main__":
    # Tests import this file as `pytest`: there shall be one of it.
    sys.modules["pytest"] = sys.modules["__main__"]
    sys.exit(importlib.import_module("run_tests").main())
