"""Objects as files: the blocking half of file://, called in threads.

An object appears in one step: it is written to `.tmp/` under the root, made durable, and then linked to its name (or
renamed over it). A writer holds a lock on its temporary, so that whoever comes later can tell a dead writer's leavings,
whose lock is free, from a file in the making, even across containers. No part of a key starts with a dot, so nothing
in `.tmp/` is ever an object. Directories below the root are walked one by one without following symbolic links.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from kvstore_s3.errors import BitstreamFault, DamagedObjectError, ObjectNotFoundError, StoreRefusedError
from kvstore_s3.objectstore.base import MAX_METADATA_BYTES, ObjectInfo, is_key

_TEMPORARIES = ".tmp"
_ATTRIBUTE = "user.kvstore-s3"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC
_NO_ATTRIBUTES = frozenset({errno.ENOTSUP, errno.ENOSPC, errno.EDQUOT, errno.E2BIG, errno.ERANGE, errno.EPERM})
_NO_LOCKS = frozenset({errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK})
_DAMAGES: Mapping[int, str] = {
    errno.ELOOP: "a symbolic link lies in its place; remove it",
    errno.ENOTDIR: "a file or a symbolic link lies in the place of a directory; remove it",
    errno.ENXIO: "it is not a regular file; remove what lies in the object's place",
    errno.EIO: "the disk cannot read it; check the disk",
}
"""What is wrong with one object alone, whose neighbours can still be read."""
_PUBLISH_ATTEMPTS = 100
"""How often a directory may vanish under a writer, by deletes beside it, until it gives up."""


class LocalFiles:
    """Blocking operations on the objects below `root`.

    Raises OSError as it comes, for `LocalStore` to map, with a whole path or none that counts. Where `stat` and `read`
    meet something in the place of one object that is none, they raise `DamagedObjectError` (TRUNCATED).
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def check_root(self) -> None:
        """Raise unless the root is a directory that can be listed, or could be created."""
        nearest = next(path for path in (self.root, *self.root.parents) if os.path.lexists(path))
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
        wanted = os.R_OK | os.X_OK if nearest == self.root else os.W_OK | os.X_OK
        if not os.access(nearest, wanted):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(nearest))

    def write(self, key: str, data: memoryview, metadata: Mapping[str, str], *, replace: bool) -> bool:
        """Create or replace an object; False where it exists and is to be left alone."""
        if not replace and self._exists(key):
            return False
        with self._open_temporaries() as directory, _open_temporary(directory) as (name, file):
            _write_all(file, data)
            _set_metadata(file, metadata)
            os.fdatasync(file)  # before it has a name: after a power failure, too, a name stands for all the bytes
            return self._publish(directory, name, key, replace=replace)

    def stat(self, key: str) -> ObjectInfo | None:
        try:
            with self._open_object(key) as file:
                return ObjectInfo(key, os.fstat(file).st_size, _get_metadata(file))
        except FileNotFoundError:
            return None

    def read(self, key: str, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `start` on."""
        end = start + len(target)
        try:
            with self._open_object(key) as file:
                size = os.fstat(file).st_size
                complete = end <= size and _read_all(file, start, target)
        except FileNotFoundError:
            raise ObjectNotFoundError(f"{self.root}: there is no object {key}") from None
        if not complete:
            message = f"{self.root / key} ends at byte {size}, {end} were expected"
            raise DamagedObjectError(BitstreamFault.TRUNCATED, message)

    def walk(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose key starts with `prefix`, tolerating those that vanish meanwhile."""
        pending = [prefix.rpartition("/")[0]]
        while pending:
            directory = pending.pop()
            for name, status in self._scan(directory):
                path = f"{directory}/{name}" if directory else name
                if stat.S_ISDIR(status.st_mode):
                    if f"{path}/".startswith(prefix) or prefix.startswith(f"{path}/"):
                        pending.append(path)
                elif stat.S_ISREG(status.st_mode) and path.startswith(prefix) and is_key(path):
                    yield ObjectInfo(path, status.st_size)

    def remove(self, key: str) -> None:
        """Delete an object, and the directories that it leaves empty."""
        parent, _, leaf = key.rpartition("/")
        try:
            with self._open_directory(parent) as directory:
                os.unlink(leaf, dir_fd=directory)
            while parent:
                emptied = self.root / parent
                parent, _, leaf = parent.rpartition("/")
                with self._open_directory(parent) as directory, _naming(emptied):
                    os.rmdir(leaf, dir_fd=directory)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise

    def sweep(self, *, dry_run: bool = False) -> int:
        """Delete the temporaries of writers that died; return how many. A living writer's are left alone.

        With `dry_run` they are counted alone.
        """
        swept = 0
        with suppress(FileNotFoundError, PermissionError), self._open_directory(_TEMPORARIES) as directory:
            for name in os.listdir(directory):
                swept += _remove_if_dead(directory, name, dry_run=dry_run)
        return swept

    def _scan(self, directory: str) -> list[tuple[str, os.stat_result]]:
        found = []
        with (
            suppress(FileNotFoundError),
            self._open_directory(directory) as opened,
            _naming(self.root / directory),
            os.scandir(opened) as entries,
        ):
            for entry in entries:
                with suppress(FileNotFoundError):
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
        return [(name, status) for name, status in found if is_key(name)]

    def _publish(self, directory: int, name: str, key: str, *, replace: bool) -> bool:
        for _ in range(_PUBLISH_ATTEMPTS):
            with suppress(FileNotFoundError):  # a delete beside us removed the directory while it was empty
                return self._publish_once(directory, name, key, replace=replace)
        return self._publish_once(directory, name, key, replace=replace)

    def _publish_once(self, directory: int, name: str, key: str, *, replace: bool) -> bool:
        parent, _, leaf = key.rpartition("/")
        with self._open_directory(parent, create=True) as target:
            return _give_name(directory, name, target, leaf, replace=replace)

    def _exists(self, key: str) -> bool:
        parent, _, leaf = key.rpartition("/")
        try:
            with self._open_directory(parent) as directory:
                status = os.stat(leaf, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(status.st_mode):
            raise StoreRefusedError(
                f"{self.root / key}: a file was expected; a directory, symbolic link, pipe or socket lies in its "
                "place; remove it"
            )
        return True

    @contextmanager
    def _open_object(self, key: str) -> Iterator[int]:
        parent, _, leaf = key.rpartition("/")
        with self._open_root() as root, _damage_of(self.root / key):  # the root's own errors are the whole store's
            with self._open_below(root, parent) as directory:
                # Non-blocking, so that a named pipe in an object's place cannot hang a reader.
                file = os.open(leaf, os.O_RDONLY | os.O_NONBLOCK | _NO_LINK, dir_fd=directory)
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
                yield file
            finally:
                os.close(file)

    @contextmanager
    def _open_temporaries(self) -> Iterator[int]:
        if not self.root.is_dir():
            for path in (*reversed(self.root.parents), self.root):
                with suppress(FileExistsError):
                    path.mkdir(mode=0o700)
        with self._open_directory(_TEMPORARIES, create=True) as directory:
            yield directory

    @contextmanager
    def _open_directory(self, path: str, *, create: bool = False) -> Iterator[int]:
        with self._open_root() as root, self._open_below(root, path, create=create) as directory:
            yield directory

    @contextmanager
    def _open_root(self) -> Iterator[int]:
        with _naming(self.root):
            root = os.open(self.root, _DIRECTORY)
        try:
            yield root
        finally:
            os.close(root)

    @contextmanager
    def _open_below(self, root: int, path: str, *, create: bool = False) -> Iterator[int]:
        """Open a directory below the root, part by part, so that no symbolic link leads out of it."""
        directory, reached = os.dup(root), self.root
        try:
            for part in filter(None, path.split("/")):
                reached /= part
                with _naming(reached):
                    if create:
                        with suppress(FileExistsError):
                            os.mkdir(part, 0o700, dir_fd=directory)
                    inner = os.open(part, _DIRECTORY | _NO_LINK, dir_fd=directory)
                os.close(directory)
                directory = inner
            yield directory
        finally:
            os.close(directory)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the whole path in an OSError: a call relative to an open directory names the last part alone."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """Raise `DamagedObjectError` for what is wrong with the object at `path` alone."""
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        if code not in _DAMAGES:
            raise
        where = error.filename if code == errno.ENOTDIR else path  # the directory's place, above the object's
        message = f"{where}: {_DAMAGES[code]} [{errno.errorcode[code]}]"
        raise DamagedObjectError(BitstreamFault.TRUNCATED, message) from error


@contextmanager
def _open_temporary(directory: int) -> Iterator[tuple[str, int]]:
    """Create a locked file, and remove it again at the end if it was not renamed."""
    name, file = _create_temporary(directory)
    try:
        yield name, file
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
        os.close(file)


def _create_temporary(directory: int) -> tuple[str, int]:
    while True:
        name = secrets.token_hex(16)
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o600, dir_fd=directory)
        try:
            _lock(file, fcntl.LOCK_EX)
        except OSError:
            os.unlink(name, dir_fd=directory)
            os.close(file)
            raise
        if os.fstat(file).st_nlink > 0:
            return name, file
        os.close(file)  # a sweep came between creating and locking it


def _remove_if_dead(directory: int, name: str, *, dry_run: bool) -> bool:
    try:
        file = os.open(name, os.O_WRONLY | os.O_NONBLOCK | _NO_LINK, dir_fd=directory)
    except OSError:
        return False
    try:
        if not _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False  # without locks nobody can tell, so nothing is swept
        if not dry_run:
            os.unlink(name, dir_fd=directory)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def _lock(file: int, how: int) -> bool:
    """Lock the file, or return False where the file system has no locks."""
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _give_name(directory: int, name: str, target: int, leaf: str, *, replace: bool) -> bool:
    if replace:
        os.replace(name, leaf, src_dir_fd=directory, dst_dir_fd=target)
        return True
    try:
        os.link(name, leaf, src_dir_fd=directory, dst_dir_fd=target, follow_symlinks=False)
    except FileExistsError:
        return False
    return True


def _write_all(file: int, data: memoryview) -> None:
    offset = 0
    while offset < len(data):
        offset += os.pwritev(file, [data[offset:]], offset)


def _read_all(file: int, start: int, target: memoryview) -> bool:
    """Fill `target`; False where the file ends before."""
    filled = 0
    while filled < len(target):
        count = os.preadv(file, [target[filled:]], start + filled)
        if count == 0:
            return False
        filled += count
    return True


def _set_metadata(file: int, metadata: Mapping[str, str]) -> None:
    if not metadata:
        return
    try:
        os.setxattr(file, _ATTRIBUTE, json.dumps(dict(metadata), separators=(",", ":")).encode("ascii"))
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTES:
            raise


def _get_metadata(file: int) -> dict[str, str]:
    """Whatever cannot be read as metadata is none: it is a hint only."""
    try:
        value = os.getxattr(file, _ATTRIBUTE)
        found = json.loads(value) if len(value) <= 8 * MAX_METADATA_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        return {}
    return found
