"""file://: objects as files in a directory tree, the embedded default.

Files are 0600 and directories 0700. File calls run in threads and read and write the caller's memory directly.
What is wrong with one object alone (a directory, link, pipe or socket in its place, a file in its directory's place, a
disk that cannot read it) is a `DamagedObjectError` of `head` and `get_range`: the other objects can still be read.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

from kvstore_s3.errors import StoreError, StoreRefusedError, StoreUnavailableError
from kvstore_s3.objectstore.awaiting import finish
from kvstore_s3.objectstore.base import (
    Buffer,
    ObjectInfo,
    check_key,
    check_metadata,
    check_prefix,
    view_source,
    view_target,
)
from kvstore_s3.objectstore.local_files import LocalFiles

T = TypeVar("T")

_LIST_BATCH = 1000

_REFUSED: Mapping[int, str] = {
    errno.EACCES: "permission denied; give this user access to it",
    errno.EPERM: "not permitted; the file system must allow hard links, and this user must own the directory",
    errno.ENOTSUP: "the file system has no hard links; use another one",
    errno.EROFS: "the file system is read-only; mount it writable or use another directory",
    errno.ENOTDIR: "a directory was expected; a file or a symbolic link lies in its place",
    errno.EISDIR: "a file was expected; a directory lies in its place",
    errno.ELOOP: "symbolic links below the store's directory are not followed; replace it by what it points to",
    errno.EXDEV: "the directory contains another mounted file system; an object cannot move into it in one step",
    errno.ENAMETOOLONG: "the name is too long for this file system",
}

_UNAVAILABLE: Mapping[int, str] = {
    errno.ENOSPC: "no space is left; free some or use another directory",
    errno.EDQUOT: "the disk quota is used up; free some space or raise it",
    errno.EIO: "the disk reported an error; check it",
    errno.EMFILE: "too many files are open in this process; raise its limit (ulimit -n)",
}


class LocalStore:
    """An `ObjectStore` in the directory `root`, which the first write creates. At most `threads` calls run at once."""

    def __init__(self, root: Path, *, threads: int) -> None:
        self._files = LocalFiles(root)
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="kvstore-file")
        self._closed = False
        self._swept = False

    @property
    def url(self) -> str:
        return self._files.root.as_uri()

    async def probe(self) -> None:
        await self._run(self._files.check_root)
        await self._sweep_once()

    async def put(
        self, key: str, data: Buffer, *, metadata: Mapping[str, str] | None = None, replace: bool = False
    ) -> bool:
        check_key(key)
        source, kept = view_source(data), check_metadata(metadata)
        await self._sweep_once()
        return await self._run(lambda: self._files.write(key, source, kept, replace=replace), key)

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        return await self._run(lambda: self._files.stat(key), key)

    async def get_range(self, key: str, start: int, into: memoryview) -> None:
        check_key(key)
        target = view_target(start, into)
        await self._run(lambda: self._files.read(key, start, target), key)

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        walk = self._files.walk(check_prefix(prefix))
        while batch := await self._run(lambda: _take(walk)):
            for info in batch:
                yield info

    async def delete(self, key: str) -> None:
        check_key(key)
        await self._run(lambda: self._files.remove(key), key)

    async def close(self) -> None:
        self._closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def sweep(self, *, dry_run: bool = False) -> int:
        """Delete the temporary files of writers that died, and return how many; with `dry_run`, count them alone."""
        self._swept = True
        return await self._run(lambda: self._files.sweep(dry_run=dry_run))

    async def _sweep_once(self) -> None:
        if not self._swept:
            await self.sweep()

    async def _run(self, work: Callable[[], T], key: str = "") -> T:
        """Run `work`, on the object `key`, in a thread and wait for its end even when cancelled.

        It may use the caller's memory.
        """
        if self._closed:
            raise StoreUnavailableError(f"{self.url} is closed; open it again")
        call = self._executor.submit(work)
        try:
            return await finish(asyncio.wrap_future(call), on_cancel=call.cancel)
        except OSError as error:
            raise _map_error(self._files.root / key, error) from error


def _take(walk: Iterator[ObjectInfo]) -> list[ObjectInfo]:
    return list(islice(walk, _LIST_BATCH))


def _map_error(path: Path, error: OSError) -> StoreError:
    """Map an error met at `path`. Only a whole path in the error knows better: others are relative or descriptors."""
    named = error.filename
    where = named if isinstance(named, str) and os.path.isabs(named) else path
    code = error.errno or 0
    if code in _REFUSED:
        return StoreRefusedError(f"{where}: {_REFUSED[code]} [{errno.errorcode[code]}]")
    advice = _UNAVAILABLE.get(code, os.strerror(code))
    return StoreUnavailableError(f"{where}: {advice} [{errno.errorcode.get(code, 'OSError')}]")
