"""Steps: commands with a limit of time each, whose output is kept, and of which none hides another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .machine import Machine
from .places import BUILD, LOGS, REPOSITORY, RESULTS

SECONDS = 455
"""For all steps together; a step that would end later is stopped."""
PATIENCE = 5
"""Seconds until processes that were asked to end are ended."""

Command = Sequence[object]


@dataclass(frozen=True)
class Outcome:
    step: str
    state: str  # passed, failed, stopped (out of time), lacking
    seconds: float
    detail: str = ""


@dataclass
class Run:
    """The steps so far. What is known is on disk after each of them."""

    machine: Machine
    environment: Mapping[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)
    outcomes: list[Outcome] = field(default_factory=list)
    _processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _ended: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    @property
    def left(self) -> float:
        """Seconds."""
        return SECONDS - self.elapsed

    def do(self, step: str, command: Command, *, limit: float, lacks: Sequence[str] = (), **variables: str) -> bool:
        """Run one command with its output in logs/<step>.log; keep and say how it ended."""
        return self.do_all({step: command}, limit=limit, lacks=lacks, workers=1, **variables)

    def do_all(
        self,
        commands: Mapping[str, Command],
        *,
        limit: float,
        workers: int,
        lacks: Sequence[str] = (),
        **variables: str,
    ) -> bool:
        """A step for each command, some at once; they end together `limit` seconds from now."""
        if lacks:
            for step in commands:
                self.keep(Outcome(step, "lacking", 0.0, "needs " + ", ".join(lacks)))
            return False
        end = time.monotonic() + min(limit, self.left)

        def work(step: str) -> bool:
            print(f"-- {step}", flush=True)
            outcome, tail = self._run_logged(step, [commands[step]], end, variables)
            if outcome.state != "passed":
                print("\n".join(tail[-40:]))
            return self.keep(outcome)

        with ThreadPoolExecutor(workers) as pool:
            return all(list(pool.map(work, commands)))

    def build(self, step: str, commands: Sequence[Command], end: float) -> Outcome:
        """Commands one after the other, as one step that is not kept yet."""
        outcome, tail = self._run_logged(step, commands, end, {})
        if outcome.state != "passed":
            print("\n".join(tail[-40:]))
        return outcome

    def keep(self, outcome: Outcome) -> bool:
        with self._lock:
            self.outcomes.append(outcome)
            print(f"   {outcome.step}: {outcome.state}, {outcome.seconds:.0f} s  {outcome.detail[:160]}", flush=True)
            self.write()
        return outcome.state == "passed"

    def write(self) -> None:
        """The outcomes so far, beside the figures where there is a GPU."""
        steps = {one.step: asdict(one) for one in self.outcomes}
        checks = {**self.machine.describe(), **self.facts, "seconds": self.elapsed, "steps": steps}
        add_checks(BUILD / "checks.json", checks)
        if self.machine.gpu is not None:
            add_checks(RESULTS / f"gpu-{self.machine.slug}.json", checks)

    def begin_results(self) -> None:
        """Figures of an earlier run are none of this one; they move to build/gpu."""
        path = RESULTS / f"gpu-{self.machine.slug}.json"
        if self.machine.gpu is not None and path.exists():
            path.rename(BUILD / f"{path.stem}.before.json")
        (BUILD / "checks.json").unlink(missing_ok=True)

    def end(self) -> None:
        """End what runs, and start nothing any more."""
        self._ended = True
        for process in list(self._processes):
            end_group(process)

    def _run_logged(
        self, step: str, commands: Sequence[Command], end: float, variables: Mapping[str, str]
    ) -> tuple[Outcome, list[str]]:
        begin, state = time.monotonic(), "passed"
        log = LOGS / f"{step.replace(' ', '-').replace('/', '-')}.log"
        with log.open("wb") as output:
            for command in commands:
                state = self._run(command, output, end, variables)
                if state != "passed":
                    break
        tail = log.read_text(errors="replace").strip().splitlines()
        return Outcome(step, state, time.monotonic() - begin, tail[-1] if tail else ""), tail

    def _run(self, command: Command, output: Any, end: float, variables: Mapping[str, str]) -> str:
        """In a group of its own: what the command started ends with it."""
        if self._ended or end <= time.monotonic():
            return "stopped"
        try:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment, **variables},
                cwd=REPOSITORY,
                start_new_session=True,
            )
        except OSError as error:
            output.write(f"{command[0]} cannot be run: {error}\n".encode())
            return "failed"
        self._processes.add(process)
        try:
            code = process.wait(max(end - time.monotonic(), 0.1))
            return "stopped" if self._ended else "failed" if code else "passed"
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:
            end_group(process)
            self._processes.discard(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does first: tests and benchmarks say and keep then what they have."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            continue


def add_checks(path: Path, checks: Mapping[str, Any]) -> None:
    """Under another name first: a program that is ended while it writes leaves the file whole."""
    document = json.loads(path.read_text()) if path.exists() else {"benchmark": path.stem}
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps({**document, "checks": checks}, indent=2) + "\n", encoding="ascii")
    draft.replace(path)


def stop_on_signals(run: Run) -> None:
    """Ctrl-C and SIGTERM end the step and the ones that follow; what is known is kept."""

    def stop(number: int, _: object) -> None:
        os.write(sys.stdout.fileno(), f"\nended by {signal.Signals(number).name}\n".encode())
        run.end()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
