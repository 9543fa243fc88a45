"""Finds, prepares and runs tests for the stand-in pytest.py."""

from __future__ import annotations

import argparse
import asyncio
import configparser
import importlib.util
import inspect
import itertools
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SCOPES = ("function", "module", "session")


class Cache:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def mkdir(self, name: str) -> Path:
        made = self._folder / "d" / name
        made.mkdir(parents=True, exist_ok=True)
        return made


@dataclass(frozen=True)
class Config:
    cache: Cache


@dataclass
class Case:
    """A test with its parameters."""

    name: str
    function: Callable[..., Any]
    parameters: Mapping[str, Any]
    marks: Sequence[pytest.Mark]


@dataclass
class Session:
    config: Config
    fixtures: dict[str, pytest.Fixture]
    stacks: dict[str, ExitStack] = field(default_factory=lambda: {scope: ExitStack() for scope in SCOPES})
    values: dict[str, dict[str, Any]] = field(default_factory=lambda: {scope: {} for scope in SCOPES})

    def value_of(self, name: str, parameters: Mapping[str, Any]) -> Any:
        """A parameter, or a fixture's value, made where its scope has none yet."""
        if name in parameters:
            return parameters[name]
        if name == "pytestconfig":
            return self.config
        if name not in self.fixtures:
            raise pytest.TestFailedError(f"this stand-in for pytest has no fixture {name!r}")
        found = self.fixtures[name]
        values = self.values[found.scope]
        if name not in values:
            names = inspect.signature(found.make).parameters
            given = {one: self.value_of(one, parameters) for one in names if one != "request"}
            if "request" in names:
                given["request"] = types.SimpleNamespace(param=parameters[f"param of {name}"])
            if inspect.isgeneratorfunction(found.make):
                values[name] = self.stacks[found.scope].enter_context(contextmanager(found.make)(**given))
            else:
                values[name] = found.make(**given)
        return values[name]

    def close(self, scope: str) -> None:
        self.values[scope].clear()
        self.stacks[scope].close()

    def run(self, case: Case) -> None:
        try:
            for name in [name for name, one in self.fixtures.items() if one.autouse]:
                self.value_of(name, case.parameters)
            for one in case.marks:
                for name in one.given if one.name == "usefixtures" else ():
                    self.value_of(name, case.parameters)
            names = inspect.signature(case.function).parameters
            result = case.function(**{name: self.value_of(name, case.parameters) for name in names})
            if inspect.iscoroutine(result):
                asyncio.run(result)
        finally:
            self.close("function")


def cases_of(module: types.ModuleType, fixtures: Mapping[str, pytest.Fixture]) -> Iterator[Case]:
    shared = getattr(module, "pytestmark", [])
    for name, function in list(vars(module).items()):
        if not name.startswith("test_") or not inspect.isfunction(function) or function.__module__ != module.__name__:
            continue
        marks = [*getattr(function, "marks", []), *(shared if isinstance(shared, list) else [shared])]
        choices = [list(parametrize(*one.given, **one.named)) for one in marks if one.name == "parametrize"]
        for used, found in used_by(function, fixtures).items():
            if found.params:
                choices.append(list(parametrize(f"param of {used}", found.params, ids=found.ids)))
        for chosen in itertools.product(*choices):
            label = "-".join(text for text, _ in chosen)
            parameters = {key: value for _, part in chosen for key, value in part.items()}
            yield Case(f"{name}[{label}]" if label else name, function, parameters, marks)


def used_by(function: Callable[..., Any], fixtures: Mapping[str, pytest.Fixture]) -> dict[str, pytest.Fixture]:
    """Fixtures that a test asks for, and those that they ask for."""
    found: dict[str, pytest.Fixture] = {}
    names = list(inspect.signature(function).parameters)
    while names:
        name = names.pop(0)
        if name in fixtures and name not in found:
            found[name] = fixtures[name]
            names += inspect.signature(fixtures[name].make).parameters
    return found


def parametrize(names: Any, values: Any, *, ids: Any = None) -> Iterator[tuple[str, dict[str, Any]]]:
    split = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    alone = len(split) == 1 and isinstance(names, str)
    for number, value in enumerate(values):
        row = (value,) if alone else tuple(value)
        label = ids(value) if callable(ids) else ids[number] if ids else "-".join(str(one)[:30] for one in row)
        yield str(label), dict(zip(split, row, strict=True))


def load(path: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def fixtures_in(module: Any) -> dict[str, pytest.Fixture]:
    return {name: value for name, value in vars(module).items() if isinstance(value, pytest.Fixture)}


def find_files(given: Sequence[Path]) -> list[Path]:
    return [file for path in given for file in (sorted(path.rglob("test_*.py")) if path.is_dir() else [path])]


def run_file(path: Path, config: Config, root: Path, words: Sequence[str], stop: bool, counts: dict[str, int]) -> None:
    """Run what one file has, and say what was skipped and what failed."""
    shown = path.name
    try:
        session = open_session(path, config, root)
        module = load(path, path.stem)
        session.fixtures |= fixtures_in(module)
    except pytest.TestSkippedError as reason:
        counts["skipped"] += 1
        print(f"SKIPPED {shown}: {reason}")
        return
    except Exception:  # noqa: BLE001 - whatever importing tests raises
        counts["failed"] += 1
        print(f"FAILED {shown}\n{traceback.format_exc()}")
        return
    for case in cases_of(module, session.fixtures):
        if words and not any(word in case.name for word in words):
            continue
        state, detail = run_case(session, case)
        counts[state] += 1
        if state != "passed":
            print(f"{state.upper()} {shown}::{case.name}{detail}", flush=True)
        if state == "failed" and stop:
            break
    for scope in SCOPES:
        session.close(scope)


def open_session(path: Path, config: Config, root: Path) -> Session:
    fixtures = fixtures_in(pytest)
    for folder in reversed([path.parent, *path.parent.parents]):
        if (folder / "conftest.py").exists() and folder.is_relative_to(root):
            fixtures |= fixtures_in(load(folder / "conftest.py", f"conftest_of_{folder.name}"))
    return Session(config, fixtures)


def run_case(session: Session, case: Case) -> tuple[str, str]:
    for one in case.marks:
        if one.name == "skipif" and one.given[0]:
            return "skipped", f": {one.named['reason']}"
    try:
        session.run(case)
    except pytest.TestSkippedError as reason:
        return "skipped", f": {reason}"
    except Exception:  # noqa: BLE001 - whatever a test raises
        return "failed", "\n" + traceback.format_exc()
    return "passed", ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="pytest", description=__doc__)
    parser.add_argument("-c", type=Path, required=True)
    parser.add_argument("--rootdir", type=Path, required=True)
    parser.add_argument("-k", default="")
    parser.add_argument("-x", action="store_true")
    parser.add_argument("-q", action="store_true")
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    ini = configparser.ConfigParser()
    ini.read(options.c)
    settings = ini["pytest"]
    sys.path[:0] = [str((options.c.parent / folder).resolve()) for folder in settings["pythonpath"].split()]
    config = Config(Cache(options.rootdir / settings["cache_dir"]))
    words = [word.strip() for word in options.k.split(" or ") if word.strip()]
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    warnings.simplefilter("default")
    for file in find_files(options.files):
        if not (options.x and counts["failed"]):
            run_file(file.resolve(), config, options.rootdir.resolve(), words, options.x, counts)
    print(", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no tests")
    return 1 if counts["failed"] else 0 if counts["passed"] or counts["skipped"] else 5
