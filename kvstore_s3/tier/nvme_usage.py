"""How many bytes of the budget are taken, for all processes that share a directory: one number in a locked file.

Blocking; called in threads. The number errs on the safe side: it grows before a file is made and shrinks after one is
gone, so a process that is killed in between leaves it too large, never too small. Whoever starts counts afresh.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

_RECORD = struct.Struct("<8sQQ")
_MAGIC = b"KVS3USE1"
_CHECK_BYTES = 8
_BYTES = _RECORD.size + _CHECK_BYTES


class Ledger:
    """The locked numbers. `used` is None where the file is new or damaged: count, then call `set`."""

    def __init__(self, file: int) -> None:
        self._file = file
        self.used, self.generation = parse(os.pread(file, _BYTES, 0))

    def set(self, used: int) -> None:
        self.used = max(used, 0)
        self._write()

    def change(self, difference: int) -> None:
        """Add to the bytes in use; at once, so that no death can come between."""
        self.set((self.used or 0) + difference)

    def announce(self) -> int:
        """Tell the other processes that there is a new file; return the new generation."""
        self.generation += 1
        self._write()
        return self.generation

    def _write(self) -> None:
        record = _RECORD.pack(_MAGIC, self.used or 0, self.generation)
        os.pwrite(self._file, record + blake3(record).digest(length=_CHECK_BYTES), 0)


class SharedUsage:
    """The file at `path`; every `locked` opens and locks it anew, so that threads exclude each other, too."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[Ledger]:
        """Raises OSError: the directory is gone, read-only, or its file system has no locks."""
        file = self._open()
        try:
            yield Ledger(file)
        finally:
            os.close(file)

    def _open(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file).st_nlink > 0:
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # somebody removed the file between opening and locking it


def parse(record: bytes) -> tuple[int | None, int]:
    """(bytes in use, generation) of what the file holds; (None, 0) where it is damaged or empty."""
    body, check = record[: _RECORD.size], record[_RECORD.size : _BYTES]
    if len(record) < _BYTES or check != blake3(body).digest(length=_CHECK_BYTES) or body[:8] != _MAGIC:
        return None, 0
    _, used, generation = _RECORD.unpack(body)
    return used, generation
