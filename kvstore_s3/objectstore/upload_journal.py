"""Which multipart uploads are under way, on disk: what a process that is killed leaves behind can be found and aborted.

A store cannot always be asked (MinIO lists the uploads of an exact key alone), so an upload is written down before it
is created, and struck out once it was completed or aborted. One file for each store that is open, of JSON lines:

    {"begin": 1, "endpoint": "http://127.0.0.1:9000", "bucket": "kv", "key": "ab/cd/l0-2.h0-2", "time": 1763740000.0}
    {"upload": 1, "id": "..."}
    {"end": 1}

The file is locked as long as its writer lives. Lines survive the death of the process, not that of the machine: a
bucket's lifecycle rule is for that. There are no credentials in it. Without a disk to write to, uploads go on without.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiofiles
import aiofiles.os

from kvstore_s3.objectstore.awaiting import finish

log = logging.getLogger("kvstore_s3")

_SUFFIX = ".jsonl"
_MOST_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class JournaledUpload:
    """An upload that was begun and not struck out. `upload_id` is None where its writer died before it learned it."""

    number: int
    endpoint: str
    bucket: str
    key: str
    begun: float
    upload_id: str | None = None


class Note:
    """One upload in the journal."""

    def __init__(self, journal: UploadJournal, number: int) -> None:
        self._journal = journal
        self._number = number
        self._gone = True
        self._doubtful = False

    @property
    def settled(self) -> bool:
        """Whether nothing of it can be left on the server."""
        return self._gone and not self._doubtful

    async def begun(self, upload_id: str) -> None:
        """Create answered."""
        await self._journal._append({"upload": self._number, "id": upload_id})

    def settle(self) -> None:
        """It was completed or aborted: it is struck out. Otherwise a later sweep looks after it."""
        self._gone = True

    def doubt(self, reason: Exception) -> None:
        """An attempt to create it failed for `reason`: the server may have begun one that nobody knows of."""
        self._doubtful = True

    def trust(self) -> None:
        """There is no such upload."""
        self._doubtful = False

    @property
    def doubtful(self) -> bool:
        return self._doubtful


class UploadJournal:
    """The journal of one open store, a file in `folder` from the first upload on. For one event loop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / (secrets.token_hex(16) + _SUFFIX)
        self._numbers = itertools.count(1)
        self._under_way: set[int] = set()
        self._turn = asyncio.Lock()
        self._file: Any = None
        self._broken = False

    @asynccontextmanager
    async def upload(self, bucket: str, key: str, endpoint: str) -> AsyncIterator[Note]:
        """Around an upload, from before its Create. Call `settle` on the note once it was completed or aborted."""
        note = Note(self, number := next(self._numbers))
        self._under_way.add(number)
        begin = {"begin": number, "endpoint": endpoint, "bucket": bucket, "key": key, "time": time.time()}
        try:
            await self._append(begin)
            note._gone = False
            yield note
        finally:
            if note.settled:
                self._under_way.discard(number)
                await self._append({"end": number})

    async def close(self) -> None:
        """Remove the file, unless an upload in it is not settled; then it is left to whoever sweeps."""
        async with self._turn:
            file, self._file, self._broken = self._file, None, True
            if file is not None:
                await finish(self._close(file))

    async def _close(self, file: Any) -> None:
        if not self._under_way:
            with suppress(OSError):
                await aiofiles.os.unlink(self._path)
        await file.close()

    async def _append(self, line: Mapping[str, object]) -> None:
        """Write one line, to its end even when cancelled."""
        async with self._turn:
            if self._broken:
                return
            try:
                await finish(self._write(json.dumps(line).encode("ascii") + b"\n"))
            except OSError as error:
                self._broken = True
                log.warning(
                    "%s: uploads cannot be written down (%s); what a killed process leaves on the server is then found "
                    "by `kvstore-s3 gc --uploads` or the bucket's lifecycle rule alone",
                    self._folder,
                    error.strerror,
                )

    async def _write(self, line: bytes) -> None:
        if self._file is None:
            await aiofiles.os.makedirs(self._folder, mode=0o700, exist_ok=True)
            self._file = await aiofiles.open(self._path, "ab", buffering=0, opener=_create_locked)
        if self._under_way:
            await self._file.write(line)
        else:
            await self._file.truncate(0)  # all are struck out


@dataclass(slots=True)
class DeadJournal:
    """The journal of a process that died, locked by us. `left` is what it had under way."""

    file: int
    left: dict[int, JournaledUpload] = field(default_factory=dict)

    def settle(self, upload: JournaledUpload) -> None:
        """Strike it out: nothing of it is left on the server."""
        os.write(self.file, json.dumps({"end": upload.number}).encode("ascii") + b"\n")
        del self.left[upload.number]


@contextmanager
def claim_dead(folder: Path) -> Iterator[list[DeadJournal]]:
    """The journals of dead processes in `folder`, for us alone; at the end, those with nothing left are removed."""
    claimed: list[tuple[Path, DeadJournal]] = []
    try:
        for path in sorted(folder.glob("*" + _SUFFIX)):
            file = _open_if_dead(path)
            if file is not None:
                claimed.append((path, DeadJournal(file)))
                claimed[-1][1].left = _read(file)
        yield [journal for _, journal in claimed]
    finally:
        for path, journal in claimed:
            if not journal.left:
                with suppress(OSError):
                    path.unlink()
            os.close(journal.file)


def _create_locked(path: str, flags: int) -> int:
    file = os.open(path, flags | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_nlink == 0:  # a sweep came between creating and locking it
            raise FileNotFoundError(f"{path} vanished")
    except OSError:
        os.close(file)
        raise
    return file


def _open_if_dead(path: Path) -> int | None:
    """Open and lock a journal; None where its writer lives, or where nobody can tell."""
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        regular = stat.S_ISREG(os.fstat(file).st_mode)
    except OSError:
        regular = False
    if regular:
        return file
    os.close(file)
    return None


def _read(file: int) -> dict[int, JournaledUpload]:
    """What is under way by a journal. Lines that are torn or not ours are left out."""
    left: dict[int, JournaledUpload] = {}
    for line in os.pread(file, _MOST_BYTES, 0).splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        match found:
            case {
                "begin": int(number),
                "endpoint": str(endpoint),
                "bucket": str(bucket),
                "key": str(key),
                "time": begun,
            }:
                if isinstance(begun, int | float):
                    left[number] = JournaledUpload(number, endpoint, bucket, key, float(begun))
            case {"upload": int(number), "id": str(upload_id)} if number in left:
                left[number] = replace(left[number], upload_id=upload_id)
            case {"end": int(number)}:
                left.pop(number, None)
    return left
