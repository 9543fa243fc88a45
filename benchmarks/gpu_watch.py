"""A benchmark in a process of its own, so that what ends it ends no more than the task under way.

A CUDA error of a kernel ends all use of the GPU by its process; an endless kernel never returns; and a fault in native
code kills. In each case the task is recorded as failed, and a new process goes on with the next. The benchmark's
process gives signs of life through a pipe, and dies with the one that watches.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_journal import Journal, read_document
from record import RESULTS

LOST = 3
"""Exit code: the process cannot use the GPU any more. What failed is recorded."""
OVERTIME = 15.0
"""Seconds beyond its time that a benchmark may take to end."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Watched:
    """A benchmark: its command without what `watch` adds, its file, and the seconds that it may take, in all and
    without a sign of life.
    """

    command: Sequence[str]
    path: Path
    part: str | None
    seconds: float
    silence: float


def watch(benchmark: Watched) -> int:
    """Run it, again and again where it dies, until its time is up. Its exit code; 1 where something failed."""
    end = time.monotonic() + benchmark.seconds
    resume, begun = False, 0
    _close_old(benchmark)
    while True:
        silent, code = _run(benchmark, max(end - time.monotonic(), 0.0), resume=resume)
        known = read_document(benchmark.path, benchmark.part)
        if "begun" not in known:  # it has ended, or never began
            return code
        over = end - time.monotonic() < 1
        why = f"no sign of life for {benchmark.silence:.0f} s" if silent else _tell(code)
        why = f"the time was up: {benchmark.seconds:.0f} s" if over else why
        journal = Journal(benchmark.path, {}, part=benchmark.part, resume=True)
        if known.get("under_way"):
            journal.fail(known["under_way"], why)
        if over or len(known["begun"]) == begun:
            journal.close()
            print(f"the benchmark ended: {why}", file=sys.stderr, flush=True)
            return 1
        journal.end()
        print(f"-- {why}; another process goes on with the next", flush=True)
        resume, begun = True, len(known["begun"])


def _close_old(benchmark: Watched) -> None:
    """What a benchmark that was killed has left is not this one's."""
    for aside in benchmark.path.parent.glob(f"{benchmark.path.stem}.*.tmp"):
        aside.unlink()
    if "begun" in read_document(benchmark.path, benchmark.part):
        Journal(benchmark.path, {}, part=benchmark.part, resume=True).close()


def _run(benchmark: Watched, left: float, *, resume: bool) -> tuple[bool, int]:
    """Whether it was silent for too long, or its time was up, and its exit code."""
    here, there = os.pipe()
    try:
        more = ["--seconds", f"{left:.1f}", "--sign", str(there), *(["--resume"] if resume else [])]
        child = subprocess.Popen([*benchmark.command, *more], pass_fds=[there])
    finally:
        os.close(there)
    with os.fdopen(here, "rb", buffering=0) as signs, child:
        end = time.monotonic() + left + OVERTIME
        while select.select([signs], [], [], max(min(benchmark.silence, end - time.monotonic()), 0))[0]:
            if not signs.read(4096):
                return False, child.wait()
        child.kill()
        return True, child.wait()


def _tell(code: int) -> str:
    if code == LOST:
        return "the GPU was lost"
    return f"the process was ended by signal {-code}" if code < 0 else f"the process ended with exit code {code}"


class Sign:
    """The watched process's end. It dies with the one that watches."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.set_inheritable(descriptor, False)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        self()

    def __call__(self) -> None:
        try:
            os.write(self._descriptor, b".")
        except BrokenPipeError:
            sys.exit("nobody watches any more")


def name_of_gpu() -> str | None:
    """As `find_machine` names it, asked of another process: this one is to hold nothing of the GPU."""
    script = Path(__file__).with_name("gpu_machine.py")
    ended = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, check=False)
    return ended.stdout.strip() or None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of every benchmark that is watched."""
    parser.add_argument("--name", help="of the result (default: gpu-<device>)")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--emulation", type=Path, metavar="LIBRARY")
    parser.add_argument("--results", type=Path, metavar="DIR", help="where the result is kept (default: results)")
    parser.add_argument("--sign", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)


def result_of(options: argparse.Namespace) -> Path:
    """The benchmark's file. `name` is known."""
    folder: Path = options.results or RESULTS
    return folder / f"{options.name}.json"


def run_watched(options: argparse.Namespace, command: Sequence[str], *, part: str | None, silence: float) -> int:
    """Run the script `command` with these options in a process of its own. The exit code; 2: no GPU."""
    options.name = options.name or ("gpu-emulation" if options.emulation else name_of_gpu())
    if options.name is None:
        return 2
    given = ["--name", options.name]
    given += ["--emulation", str(options.emulation)] if options.emulation else []
    given += ["--results", str(options.results)] if options.results else []
    return watch(Watched([sys.executable, *command, *given], result_of(options), part, options.seconds, silence))
