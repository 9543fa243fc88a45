"""What kvstore_s3's NVMe tier uses of aiofiles: a file opened, read and closed in other threads."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO


class _File:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    async def read(self, size: int = -1) -> bytes:
        return await asyncio.to_thread(self._file.read, size)


@asynccontextmanager
async def open(path: Path, mode: str) -> AsyncIterator[_File]:
    if mode != "rb":
        raise ValueError("this stand-in for aiofiles reads bytes and does nothing else")
    file = await asyncio.to_thread(builtins.open, path, mode)
    try:
        yield _File(file)
    finally:
        await asyncio.to_thread(file.close)
