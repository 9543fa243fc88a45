"""What a client under measurement does, and what it is told."""

from __future__ import annotations

import mmap
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """The endpoint (`host` with its port, `secure` for https), credentials, and the object that is read."""

    url: str
    host: str
    secure: bool
    access_key: str
    secret_key: str
    authority: str | None
    bucket: str
    key: str
    connections: int


class Client(Protocol):
    """Reads ranges of one object into given buffers, and writes objects, with as many requests in flight as buffers."""

    def get(self, starts: Sequence[int], buffers: Sequence[memoryview]) -> None:
        """Read a range from each of `starts`, as long as the buffers are, into one of the buffers."""

    def put(self, keys: Sequence[str], data: memoryview, connections: int) -> None:
        """Write `data` under each of `keys`, with a checksum that the server can verify, where the client has one."""

    def close(self) -> None: ...


def make_buffers(count: int, size: int) -> list[memoryview]:
    """Page-aligned buffers whose pages are there already."""
    buffers = [memoryview(mmap.mmap(-1, size)) for _ in range(count)]
    for buffer in buffers:
        buffer[:] = bytes(size)
    return buffers


async def share_out(work: Iterable[T], do: Callable[[int, T], Awaitable[None]], workers: int) -> None:
    """Do all of `work` with `workers` tasks, each of which is told its number."""
    import asyncio

    items = iter(work)

    async def run(number: int) -> None:
        for item in items:
            await do(number, item)

    async with asyncio.TaskGroup() as group:
        for number in range(workers):
            group.create_task(run(number))


def share_out_to_threads(
    threads: ThreadPoolExecutor, work: Sequence[T], do: Callable[[int, T], None], workers: int
) -> None:
    """The same with threads: worker n does every `workers`-th item."""

    def run(number: int) -> None:
        for item in work[number::workers]:
            do(number, item)

    for done in [threads.submit(run, number) for number in range(workers)]:
        done.result()
