"""A benchmark that dies loses the task under way, and another process goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_machine
from gpu_journal import Journal, read_document
from gpu_machine import Budget, GpuLostError, attempt
from gpu_watch import LOST, Watched, watch

from kvstore_s3.errors import DeviceError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPT = """
import argparse, os, signal, sys, threading
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
from gpu_journal import Journal
from gpu_watch import LOST, Sign, add_options
parser = argparse.ArgumentParser()
add_options(parser)
options = parser.parse_args()
journal = Journal(Path({path!r}), {{}}, part={part!r}, resume=options.resume, on_sign=Sign(options.sign))
def lose():
    journal.fail("lost", "an illegal address")
    journal.end()
    os._exit(LOST)
tasks = {{
    "good": lambda: journal.add("rows", {{"process": os.getpid()}}),
    "killed": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "silent": threading.Event().wait,
    "lost": lose,
    "wrong": lambda: 1 / 0,
    "last": lambda: journal.add("rows", {{"process": os.getpid()}}),
}}
for what in {tasks!r}:
    if journal.begin(what):
        tasks[what]()
        journal.end()
journal.close()
sys.exit(1 if journal.failed else 0)
"""


def run(folder: Path, tasks: list[str], part: str | None = None, seconds: float = 60, silence: float = 20) -> int:
    script, path = folder / "script.py", folder / "found.json"
    script.write_text(SCRIPT.format(benchmarks=str(BENCHMARKS), path=str(path), part=part, tasks=tasks))
    return watch(Watched([sys.executable, str(script)], path, part, seconds, silence))


def test_a_benchmark_in_which_nothing_fails_takes_one_process(tmp_path: Path) -> None:
    assert run(tmp_path, ["good", "last"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["rows"]) == 2
    assert len({row["process"] for row in found["rows"]}) == 1
    assert found["failed"] == []
    assert "begun" not in found


def test_behind_each_death_a_new_process_goes_on_with_the_next_task(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text('{"benchmark": "found", "codec": [1]}')
    assert run(tmp_path, ["good", "killed", "lost", "wrong", "last"], part="first_token") == 1
    whole = json.loads((tmp_path / "found.json").read_text())
    assert whole["codec"] == [1]
    found = whole["first_token"]
    assert len({row["process"] for row in found["rows"]}) == 2
    assert [(row["what"], row["why"]) for row in found["failed"]] == [
        ("killed", "the process was ended by signal 11"),
        ("lost", "an illegal address"),
        ("wrong", "the process ended with exit code 1"),
    ]


def test_a_task_without_a_sign_of_life_is_ended(tmp_path: Path) -> None:
    assert run(tmp_path, ["silent", "last"], silence=5) == 1
    found = read_document(tmp_path / "found.json", None)
    assert found["failed"] == [{"what": "silent", "why": "no sign of life for 5 s"}]
    assert len(found["rows"]) == 1


def test_a_benchmark_ends_when_its_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gpu_watch.OVERTIME", 8.0)  # in which it begins, too
    assert run(tmp_path, ["good", "silent", "last"], seconds=0) == 1
    found = read_document(tmp_path / "found.json", None)
    assert found["failed"] == [{"what": "silent", "why": "the time was up: 0 s"}]
    assert capfd.readouterr().err.endswith("the benchmark ended: the time was up: 0 s\n")
    assert len(found["rows"]) == 1
    assert "begun" not in found


def test_what_a_killed_benchmark_left_is_not_taken_up_again(tmp_path: Path) -> None:
    old = Journal(tmp_path / "found.json", {})
    old.begin("good")
    (tmp_path / "found.1234.tmp").write_text("{")
    assert run(tmp_path, ["good"]) == 0
    assert not list(tmp_path.glob("*.tmp"))
    assert len(read_document(tmp_path / "found.json", None)["rows"]) == 1


def test_a_benchmark_that_never_begins_is_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text('{"benchmark": "found", "codec": [1]}')
    code = watch(Watched([sys.executable, "-c", "import sys; sys.exit(2)"], tmp_path / "found.json", None, 60, 20))
    assert code == 2
    assert json.loads((tmp_path / "found.json").read_text()) == {"benchmark": "found", "codec": [1]}


def test_behind_a_failure_the_gpu_is_asked_whether_it_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    journal = Journal(None, {})
    budget = Budget(60, journal.left_out)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    for error in (DeviceError("no kernel"), subprocess.CalledProcessError(1, "nvcc"), AssertionError("wrong")):
        with attempt("that", journal, budget, device):
            raise error
    with attempt("that", journal, budget, device):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert len(journal.failed) == 3
    assert journal.left_out == ["that: the GPU's memory does not hold it"]

    def lost(_: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(GpuLostError, match="illegal memory access"), attempt("this", journal, budget, device):
        raise RuntimeError("launch failed")
    assert journal.failed[-1] == {"what": "this", "why": "RuntimeError: launch failed"}


def test_the_driver_is_described_where_there_is_one() -> None:
    found = gpu_machine.ask_driver(gpu_machine.LIMITS)
    assert not found or set(found) == set(gpu_machine.LIMITS)


def test_codes_of_an_end_are_told_apart() -> None:
    assert LOST not in (0, 1, 2)
