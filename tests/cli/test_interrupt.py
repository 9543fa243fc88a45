"""A run that is stopped leaves whole objects only, and the next one goes on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli.conftest import CHUNK, Cli, store_url, stored_objects
from cli.tokenizer_zoo import corpus

from kvstore_s3.cli import exits
from kvstore_s3.cli.app import run


@dataclass(frozen=True)
class Stopped:
    """A run of `warm` that was stopped in its middle: where it ran, over how many documents, what it left."""

    folder: Path
    documents: int
    code: int
    err: str


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[signal.Signals, Future[Stopped]]]:
    """A run for each signal, beside each other: starting one takes most of its time."""
    folders = {number: tmp_path_factory.mktemp(number.name) for number in (signal.SIGKILL, signal.SIGINT)}
    with ThreadPoolExecutor(len(folders)) as pool:
        yield {
            number: pool.submit(stop_in_its_middle, number, folder, tiny_model) for number, folder in folders.items()
        }


@pytest.fixture(params=[signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def stopped(request: pytest.FixtureRequest, runs: dict[signal.Signals, Future[Stopped]]) -> Stopped:
    return runs[request.param].result(180)


def stop_in_its_middle(number: signal.Signals, parent: Path, model: Path) -> Stopped:
    """A run stopped after its first step. One that was done before the signal reached it is made again, longer."""
    documents = 12
    while True:
        folder = parent / str(documents)
        folder.mkdir()
        run_ = stop(number, folder, documents, model)
        if f"{documents}/{documents} docs.jsonl" not in run_.err:
            return run_
        assert documents < 5000, "a run of thousands of documents ended before a signal could reach it"
        documents *= 5


def stop(number: signal.Signals, folder: Path, documents: int, model: Path) -> Stopped:
    lines = [json.dumps({"text": f"Document {index}. " + corpus()[: 1500 + index % 12]}) for index in range(documents)]
    (folder / "docs.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "kvstore_s3.cli", "warm", "docs.jsonl", "--model", str(model)]
    flags = ["--store", store_url(folder), "--chunk-tokens", str(CHUNK)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    with subprocess.Popen(
        [*command, *flags], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        before = []
        for line in process.stderr:
            before.append(line)
            if line.startswith("warm: "):  # the first step is computed and saved
                process.send_signal(number)
                break
        rest = process.stderr.read()
        return Stopped(folder, documents, process.wait(60), "".join(before) + rest)


def test_a_stopped_run_leaves_a_sound_store_and_a_second_run_finishes(
    stopped: Stopped, cli: Cli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, err = stopped.folder, stopped.err
    monkeypatch.chdir(folder)
    if stopped.code != -signal.SIGKILL:
        assert stopped.code == 130, err
        assert err.splitlines()[-1].endswith("a second run goes on from there")
        assert "Traceback" not in err
        assert not [path for path in (folder / "store").rglob("*") if path.is_file() and ".tmp" in path.parts]
    kept = len(stored_objects(folder))
    assert kept > 0
    assert cli("check", "--store", store_url(folder), "--decode").code == 0
    common = ("--model", tiny_model, "--store", store_url(folder), "--chunk-tokens", CHUNK)
    report = cli("warm", "docs.jsonl", *common, "--json").json
    assert report["chunks_present"] == kept < report["chunks"]
    assert report["chunks_new"] == report["chunks"] - kept
    assert len(report["documents"]) == stopped.documents
    assert cli("check", "--store", store_url(folder)).code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_becomes_an_exit_code_and_one_line(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr("kvstore_s3.cli.inspect.list_store", work)
    before = signal.getsignal(number)
    assert run(["ls", "--store", "memory://", "--json"]) == code
    assert signal.getsignal(number) is before
    out, err = capsys.readouterr()
    assert json.loads(out)["exit_code"] == code
    assert err.count("\n") == 1


def test_a_second_signal_is_not_caught() -> None:
    with exits.raise_on_signals():
        with pytest.raises(exits.Interrupted):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_reader_of_stdout_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvstore_s3.cli", "stat", "--store", store_url(tmp_path)]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (ran.returncode, ran.stderr) == (exits.SOME_FAILED, "")
