"""What lies in the directory of an NVMe tier, counted. Blocking; raises OSError as it comes."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from kvstore_s3.tier.extents import Extent
from kvstore_s3.tier.nvme_names import parse_name, path_of
from kvstore_s3.tier.nvme_usage import Ledger
from kvstore_s3.tier.pieces import file_size

_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW


class Census:
    """Whole pieces below `root`, and pieces in the making in its `.tmp`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.temporaries = root / ".tmp"

    def find(self) -> dict[Extent, int]:
        """All whole pieces, with the time of their last use. Foreign files are left out."""
        return {extent: status.st_mtime_ns for extent, status in self._walk() if is_whole(extent, status)}

    def recount(self, ledger: Ledger) -> dict[Extent, int]:
        """Like `find`; sets the ledger right, and removes what is cut short or was left by dead writers."""
        found: dict[Extent, int] = {}
        used = 0
        for extent, status in self._walk():
            if is_whole(extent, status):
                found[extent] = status.st_mtime_ns
                used += status.st_size
            else:
                remove_file(self.root / path_of(extent))  # cut short by whoever
        ledger.set(used + sum(size for _, size in self._living_temporaries()))
        return found

    def sweep(self, ledger: Ledger) -> None:
        """Give back what the temporaries of dead writers occupy."""
        before = {entry.path: entry.stat(follow_symlinks=False).st_size for entry in _scan(self.temporaries)}
        living = {path for path, _ in self._living_temporaries()}
        for path in before.keys() - living:
            ledger.change(-before[path])

    def _living_temporaries(self) -> Iterator[tuple[str, int]]:
        """Path and size of each temporary whose writer lives; the others are removed on the way."""
        for entry in _scan(self.temporaries):
            if entry.is_file(follow_symlinks=False) and not _remove_if_dead(entry.path):
                yield entry.path, entry.stat(follow_symlinks=False).st_size

    def _walk(self) -> Iterator[tuple[Extent, os.stat_result]]:
        for number in range(256):
            directory = self.root / f"{number:02x}"
            for entry in _scan(directory):
                extent = parse_name(entry.name)
                if extent is None or not extent.name.startswith(directory.name):
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield extent, status


def is_whole(extent: Extent, status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_size == file_size(extent)


def remove_file(path: Path | str) -> bool:
    """Whether there was something to remove."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def _remove_if_dead(path: str) -> bool:
    """Remove a temporary that nobody holds the lock of. The caller holds the lock on `usage`."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NONBLOCK | _OPEN)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return remove_file(path)
    except OSError:
        return False
    finally:
        os.close(file)


def _scan(directory: Path) -> Iterator[os.DirEntry[str]]:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as entries:
        yield from entries
