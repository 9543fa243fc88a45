"""The blocking half of the NVMe tier, called in threads: files below a directory that several processes share.

    <directory>/v1/usage          bytes in use, locked (see `nvme_usage`)
    <directory>/v1/.tmp/<random>  a piece in the making, locked by its writer
    <directory>/v1/<hh>/<name>    a piece that is whole (see `nvme_names`)

A piece appears by renaming. Nothing is forced to the disk: after a power failure a file may hold anything, and the
digests of the sections in it, which are verified at each read, tell. Whatever adds or removes a file holds the lock on
`usage`. Raises OSError as it comes.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from kvstore_s3.tier.base import PAGE
from kvstore_s3.tier.direct_io import read_fully, write_all
from kvstore_s3.tier.extents import Extent
from kvstore_s3.tier.nvme_census import Census, is_whole, remove_file
from kvstore_s3.tier.nvme_directory import check_private, probe_direct
from kvstore_s3.tier.nvme_names import header_fault, make_header, path_of
from kvstore_s3.tier.nvme_records import Committed, Listing, Reservation, Step, Temporary
from kvstore_s3.tier.nvme_usage import Ledger, SharedUsage
from kvstore_s3.tier.pieces import Write, file_position, file_size

_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW
_SWEEP_S = 60.0


class NvmeFiles:
    """The files of one tier. `budget` bounds their sizes together, whichever process made them."""

    def __init__(self, directory: Path, budget: int) -> None:
        self.root = directory / "v1"
        self.budget = budget
        self.direct = False
        self._census = Census(self.root)
        self._next_sweep = 0.0
        self._usage = SharedUsage(self.root / "usage")

    @property
    def usage_path(self) -> Path:
        return self._usage.path

    def open(self) -> Listing:
        """Create what is missing, remove what dead writers left, and count what is in use."""
        self.root.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for directory in (self.root, self._census.temporaries):
            directory.mkdir(exist_ok=True, mode=0o700)
            check_private(directory)
        with self._usage.locked() as ledger:
            self.direct = probe_direct(self._census.temporaries)
            return Listing(self._census.recount(ledger), ledger.generation, self.direct)

    def find(self) -> dict[Extent, int]:
        """All whole pieces, with the time of their last use. Foreign files are left out."""
        return self._census.find()

    def reserve(self, extent: Extent, victims: Sequence[tuple[Extent, int]]) -> Reservation:
        """A temporary for `extent`, after removing as many of `victims` as it takes.

        A victim comes with the time of its last use as far as it is known here: one that another process used since
        is spared. Those that are neither removed nor spared were not needed. A victim of the right size whose file
        nobody reads becomes the temporary: blocks that were written before cost half of what new ones do.
        """
        size = file_size(extent)
        with self._usage.locked() as ledger:
            if ledger.used is None:
                self._census.recount(ledger)
            if self._missing(ledger, size) > 0 and time.monotonic() >= self._next_sweep:
                self._next_sweep = time.monotonic() + _SWEEP_S
                self._census.sweep(ledger)
            removed, spared, temporary = self._remove_victims(ledger, extent, victims)
            if temporary is None:
                if (missing := self._missing(ledger, size)) > 0:
                    return Reservation(None, missing, removed, spared)
                temporary = self._create_temporary(ledger, extent)
        return Reservation(temporary, 0, removed, spared)

    def recount(self) -> dict[Extent, int]:
        """Count what is in use, in case the number drifted; return what is there."""
        with self._usage.locked() as ledger:
            return self._census.recount(ledger)

    def advance(
        self,
        key: str,
        extent: Extent,
        temporary: Temporary | None,
        victims: Sequence[tuple[Extent, int]],
        writes: Sequence[Write],
        *,
        whole: bool,
    ) -> Step:
        """Reserve where there is no `temporary` yet, write, and commit where that makes the piece whole.

        All in one call, for each change of threads costs more than a small system call.
        """
        reservation = Reservation(temporary, 0) if temporary else self.reserve(extent, victims)
        if reservation.temporary is None:
            return Step(reservation, None)
        try:
            if whole:
                return Step(reservation, self.commit(reservation.temporary, key, writes))
            self.write(reservation.temporary, writes)
        except OSError:
            self.discard(reservation.temporary)
            raise
        return Step(reservation, None)

    def write(self, temporary: Temporary, writes: Sequence[Write]) -> None:
        write_all(temporary.file, writes, direct=self.direct)

    def commit(self, temporary: Temporary, key: str, writes: Sequence[Write]) -> Committed:
        """Make the last writes, write the header and give the file its name. Closes the temporary."""
        extent = temporary.extent
        header = memoryview(mmap.mmap(-1, PAGE))
        header[:] = make_header(key, extent)
        self.write(temporary, [(0, header), *writes])
        target = self.root / path_of(extent)
        with self._usage.locked() as ledger:
            fcntl.flock(temporary.file, fcntl.LOCK_UN)  # nobody sweeps now, and readers may come from the next line on
            was_there = _modified_ns(target) is not None  # another process was as fast
            try:
                os.rename(temporary.path, target)
            except FileNotFoundError:
                target.parent.mkdir(exist_ok=True, mode=0o700)
                os.rename(temporary.path, target)
            if was_there:
                ledger.change(-file_size(extent))
            committed = Committed(os.fstat(temporary.file).st_mtime_ns, ledger.announce())
        os.close(temporary.file)
        return committed

    def discard(self, temporary: Temporary) -> None:
        """Remove a temporary. Where that fails, the next process to start does it, for the lock is gone."""
        try:
            with suppress(OSError), self._usage.locked() as ledger:
                if remove_file(temporary.path):
                    ledger.change(-file_size(temporary.extent))
        finally:
            os.close(temporary.file)

    def remove(self, extents: Sequence[Extent]) -> None:
        """Remove pieces; those that are gone already are no error."""
        with self._usage.locked() as ledger:
            for extent in extents:
                if remove_file(self.root / path_of(extent)):
                    ledger.change(-file_size(extent))

    def read(self, extent: Extent, start: int, into: memoryview, *, verify_for: str | None, touch: bool) -> int | None:
        """Fill `into` with the object's bytes from `start` on.

        Verifies the file's header, too, where `verify_for` names the key (EBADMSG). With `touch` the other processes
        learn that the piece is in use, and the time that they will see is returned. FileNotFoundError where it was
        evicted.
        """
        path = self.root / path_of(extent)
        file = os.open(path, os.O_RDONLY | _OPEN | (os.O_DIRECT if self.direct else 0))
        try:
            _hold(file, path)
            if verify_for is not None:
                self._verify(file, extent, verify_for)
            read_fully(file, file_position(extent, start), into, direct=self.direct)
            return _touch(file) if touch else None
        finally:
            os.close(file)

    def _verify(self, file: int, extent: Extent, key: str) -> None:
        status = os.fstat(file)
        page = bytearray(PAGE)
        fault: str | None = "its size is wrong"
        if is_whole(extent, status):
            read_fully(file, 0, memoryview(page), direct=self.direct)
            fault = header_fault(bytes(page), key, extent)
        if fault is not None:
            raise OSError(errno.EBADMSG, fault, str(self.root / path_of(extent)))

    def _missing(self, ledger: Ledger, size: int) -> int:
        return (ledger.used or 0) + size - self.budget

    def _remove_victims(
        self, ledger: Ledger, extent: Extent, victims: Sequence[tuple[Extent, int]]
    ) -> tuple[list[Extent], dict[Extent, int], Temporary | None]:
        """What was removed, what was spared, and a victim's file for `extent` if one will do."""
        removed: list[Extent] = []
        spared: dict[Extent, int] = {}
        for victim, known_ns in victims:
            if (missing := self._missing(ledger, file_size(extent))) <= 0:
                break
            path = self.root / path_of(victim)
            used_ns = _modified_ns(path)
            if used_ns is not None and used_ns > known_ns:
                spared[victim] = used_ns
                continue
            removed.append(victim)
            fits = missing <= file_size(victim) == file_size(extent)
            if fits and (temporary := self._take_over(path, extent)) is not None:
                return removed, spared, temporary
            if remove_file(path):
                ledger.change(-file_size(victim))
        return removed, spared, None

    def _take_over(self, path: Path, extent: Extent) -> Temporary | None:
        """Make a temporary of a whole piece's file; None where somebody reads it, or it is not as it should be."""
        flags = os.O_RDWR | _OPEN | (os.O_DIRECT if self.direct else 0)
        try:
            file = os.open(path, flags)
        except OSError:
            return None
        taken = self._census.temporaries / secrets.token_hex(16)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_whole(extent, os.fstat(file)):
                os.rename(path, taken)
                return Temporary(extent, taken, file)
        except BlockingIOError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        return None

    def _create_temporary(self, ledger: Ledger, extent: Extent) -> Temporary:
        path = self._census.temporaries / secrets.token_hex(16)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN | (os.O_DIRECT if self.direct else 0)
        ledger.change(file_size(extent))
        try:
            file = os.open(path, flags, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _allocate(file, file_size(extent))  # a count from now on sees it in full
            except OSError:
                remove_file(path)
                os.close(file)
                raise
        except OSError:
            ledger.change(-file_size(extent))
            raise
        return Temporary(extent, path, file)


def _hold(file: int, path: Path) -> None:
    """Keep an open piece from being taken over; FileNotFoundError where that has happened already."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileNotFoundError(errno.ENOENT, "it becomes another piece just now", str(path)) from None
    if not os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False)):
        raise FileNotFoundError(errno.ENOENT, "it became another piece just now", str(path))


def _allocate(file: int, size: int) -> None:
    """Room for all of the file now, so that a full disk shows here; only the size where that cannot be had."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(file, size)


def _modified_ns(path: Path) -> int | None:
    try:
        return os.stat(path, follow_symlinks=False).st_mtime_ns
    except FileNotFoundError:
        return None


def _touch(file: int) -> int | None:
    now = time.time_ns()
    try:
        os.utime(file, ns=(now, now))
    except OSError:  # a read-only file system; others then do not know
        return None
    return now
