from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore_s3.objectstore.upload_journal import JournaledUpload, UploadJournal, claim_dead

ENDPOINT = "http://127.0.0.1:9000"

WRITER = """
import asyncio, sys
from pathlib import Path
from kvstore_s3.objectstore.upload_journal import UploadJournal

async def main():
    journal = UploadJournal(Path(sys.argv[1]))
    async with journal.upload("kv", "done", "http://e") as note:
        note.settle()
    async with journal.upload("kv", "unknown", "http://e"):
        async with journal.upload("kv", "known", "http://e") as note:
            await note.begun("id 1")
            print("ready", flush=True)
            await asyncio.sleep(3600)

asyncio.run(main())
"""


def left_in(folder: Path) -> list[JournaledUpload]:
    with claim_dead(folder) as journals:
        return [entry for journal in journals for entry in journal.left.values()]


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


async def test_a_settled_upload_leaves_nothing(tmp_path: Path) -> None:
    journal = UploadJournal(tmp_path / "uploads")
    async with journal.upload("kv", "a/b", ENDPOINT) as note:
        await note.begun("id")
        note.settle()
    assert [path.stat().st_size for path in files(tmp_path / "uploads")] == [0]
    await journal.close()
    assert files(tmp_path / "uploads") == []


async def test_nothing_is_created_before_the_first_upload(tmp_path: Path) -> None:
    await UploadJournal(tmp_path / "uploads").close()
    assert files(tmp_path / "uploads") == []


async def test_an_upload_is_on_disk_before_it_begins(tmp_path: Path) -> None:
    journal = UploadJournal(tmp_path)
    async with journal.upload("kv", "a/b", ENDPOINT) as note:
        (path,) = files(tmp_path)
        begin = json.loads(path.read_text())
        assert (begin["bucket"], begin["key"], begin["endpoint"]) == ("kv", "a/b", ENDPOINT)
        await note.begun("the id")
        assert json.loads(path.read_text().splitlines()[1])["id"] == "the id"
        note.settle()
    await journal.close()


async def test_files_are_private(tmp_path: Path) -> None:
    journal = UploadJournal(tmp_path / "uploads")
    async with journal.upload("kv", "a", ENDPOINT):
        assert files(tmp_path / "uploads")[0].stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "uploads").stat().st_mode & 0o777 == 0o700
    await journal.close()


async def test_an_upload_that_was_not_settled_stays_for_whoever_sweeps(tmp_path: Path) -> None:
    journal = UploadJournal(tmp_path)
    async with journal.upload("kv", "lost", ENDPOINT) as note:
        await note.begun("id 7")
    async with journal.upload("kv", "fine", ENDPOINT) as note:
        note.settle()
    assert left_in(tmp_path) == [], "its writer lives"
    await journal.close()
    (left,) = left_in(tmp_path)
    assert (left.bucket, left.key, left.endpoint, left.upload_id) == ("kv", "lost", ENDPOINT, "id 7")


async def test_a_dead_journal_is_removed_once_all_of_it_is_settled(tmp_path: Path) -> None:
    journal = UploadJournal(tmp_path)
    for key in ("a", "b"):
        async with journal.upload("kv", key, ENDPOINT):
            pass
    await journal.close()
    with claim_dead(tmp_path) as (dead,):
        with claim_dead(tmp_path) as others:
            assert others == [], "one sweep at a time"
        dead.settle(next(iter(dead.left.values())))
    assert [entry.key for entry in left_in(tmp_path)] == ["b"]
    with claim_dead(tmp_path) as (dead,):
        dead.settle(next(iter(dead.left.values())))
    assert files(tmp_path) == []


async def test_a_cancellation_leaves_the_journal_in_order(tmp_path: Path) -> None:
    for turns in range(12):
        journal = UploadJournal(tmp_path)

        async def upload(journal: UploadJournal = journal) -> None:
            async with journal.upload("kv", "a", ENDPOINT) as note:
                try:
                    await note.begun("id")
                    await asyncio.sleep(0.01)
                finally:
                    note.settle()

        task = asyncio.create_task(upload())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await journal.close()
        assert files(tmp_path) == []


async def test_many_uploads_at_once_keep_their_lines_apart(tmp_path: Path) -> None:
    journal = UploadJournal(tmp_path)

    async def upload(number: int) -> None:
        async with journal.upload("kv", str(number), ENDPOINT) as note:
            await note.begun(f"id {number}")
            if number % 3:
                note.settle()

    await asyncio.gather(*(upload(number) for number in range(30)))
    await journal.close()
    assert {entry.key: entry.upload_id for entry in left_in(tmp_path)} == {str(n): f"id {n}" for n in range(0, 30, 3)}


async def test_without_a_disk_uploads_go_on_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "uploads").write_text("a file where the directory should be")
    journal = UploadJournal(tmp_path / "uploads")
    for _ in range(3):
        async with journal.upload("kv", "a", ENDPOINT) as note:
            await note.begun("id")
            note.settle()
    await journal.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_killed_process_leaves_what_it_had_under_way(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        assert left_in(tmp_path) == []
        writer.send_signal(signal.SIGKILL)
    assert {entry.key: entry.upload_id for entry in left_in(tmp_path)} == {"unknown": None, "known": "id 1"}


@pytest.mark.parametrize(
    "damage",
    [b"", b"\xff\x00\n", b'{"begin": 1, "endp', b"[" * 100_000, b'{"begin": "x"}\n{"end": []}\n', b'{"end": 9}\n'],
)
def test_torn_and_foreign_lines_are_left_out(tmp_path: Path, damage: bytes) -> None:
    line = {"begin": 3, "endpoint": ENDPOINT, "bucket": "kv", "key": "a", "time": 5}
    (tmp_path / "x.jsonl").write_bytes(json.dumps(line).encode() + b"\n" + damage)
    assert left_in(tmp_path) == [JournaledUpload(3, ENDPOINT, "kv", "a", 5.0)]


def test_pipes_links_and_other_files_are_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "notes.txt").write_text("mine")
    assert left_in(tmp_path) == []
    assert (tmp_path / "notes.txt").exists()


def test_a_folder_that_is_not_there_has_no_journals(tmp_path: Path) -> None:
    assert left_in(tmp_path / "none") == []
