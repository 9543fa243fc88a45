"""Where loads write: into the engine's blocks on the host, by threads, or on a GPU, where its queue does it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from kvstore_s3.codec.device.decoder import DeviceDecoder
from kvstore_s3.codec.device.requests import OnQueued
from kvstore_s3.codec.device.streams import Mark
from kvstore_s3.connectors.vllm.device_cache import DeviceCache
from kvstore_s3.connectors.vllm.paged import PagedCache
from kvstore_s3.device_load import DevicePlace
from kvstore_s3.errors import DeviceError
from kvstore_s3.load import in_thread
from kvstore_s3.objectstore.awaiting import finish

if TYPE_CHECKING:
    from kvstore_s3.transfer.ranges import Band


class PagesReady:
    """When the engine has its pages ready in a step: from then on, and on a GPU behind a mark in its queue, they may be
    written. `set` is for the engine's thread, `wait` for any other."""

    def __init__(self, make_mark: Callable[[], Mark | None] | None = None) -> None:
        self._make_mark = make_mark
        self._event = threading.Event()
        self._mark: Mark | None = None
        self._error: DeviceError | None = None

    def is_set(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        """Only the first time counts: a mark further on would be one behind more work."""
        if self._event.is_set():
            return
        try:
            self._mark = self._make_mark() if self._make_mark is not None else None
        except DeviceError as error:  # the load's to report: the engine will see for itself
            self._error = error
        self._event.set()

    def wait(self) -> Mark | None:
        """Wait, and give the mark. Raises `DeviceError` where there is none because the device failed."""
        self._event.wait()
        if self._error is not None:
            raise self._error
        return self._mark

    async def wait_in(self, threads: ThreadPoolExecutor) -> Mark | None:
        return self.wait() if self.is_set() else await in_thread(threads, self.wait)


class Blocks(Protocol):
    """The engine's blocks of the layers that this process holds."""

    @property
    def block_tokens(self) -> int: ...

    @property
    def layer_end(self) -> int:
        """One past the last layer, as the model counts them."""

    @property
    def decoder(self) -> DeviceDecoder | None:
        """What decodes into their memory; None: they are the host's."""

    def place(
        self, band: Band, block_ids: Sequence[int], pages: PagesReady, on_queued: OnQueued | None
    ) -> DevicePlace | None:
        """Where the values of whole blocks are decoded to at once; None: they are decoded aside, and written."""

    async def write(self, layer_begin: int, kv: torch.Tensor, block_ids: Sequence[int], pages: PagesReady) -> None:
        """Fill whole blocks with `kv` [layers, 2, tokens, kv heads, head dim] from the model's layer `layer_begin` on.

        Returns when all is written: then nothing of it is under way any more, even where it fails or is cancelled.
        """


class HostBlocks:
    """Threads of `writer` write. A thread of `waiter` waits for the engine to have its pages ready."""

    decoder = None

    def __init__(self, cache: PagedCache, writer: ThreadPoolExecutor, waiter: ThreadPoolExecutor) -> None:
        self.block_tokens = cache.block_tokens
        self.layer_end = cache.layer_end
        self._cache = cache
        self._writer = writer
        self._waiter = waiter

    def place(
        self, band: Band, block_ids: Sequence[int], pages: PagesReady, on_queued: OnQueued | None
    ) -> DevicePlace | None:
        return None

    async def write(self, layer_begin: int, kv: torch.Tensor, block_ids: Sequence[int], pages: PagesReady) -> None:
        await pages.wait_in(self._waiter)
        await in_thread(self._writer, self._cache.write, layer_begin, kv, block_ids)


class DeviceBlocks:
    """The decoder's stream writes, behind a mark in the engine's; nothing waits for the device but its own threads."""

    def __init__(self, cache: DeviceCache, decoder: DeviceDecoder, waiter: ThreadPoolExecutor) -> None:
        self.block_tokens = cache.block_tokens
        self.layer_end = cache.layer_end
        self.decoder = decoder
        self._cache = cache
        self._waiter = waiter

    def place(
        self, band: Band, block_ids: Sequence[int], pages: PagesReady, on_queued: OnQueued | None
    ) -> DevicePlace | None:
        memory = self._cache.memory(block_ids, band.layer_begin, band.layer_end)
        return DevicePlace(memory, self.decoder, ready=partial(pages.wait_in, self._waiter), on_queued=on_queued)

    async def write(self, layer_begin: int, kv: torch.Tensor, block_ids: Sequence[int], pages: PagesReady) -> None:
        memory = self._cache.memory(block_ids, layer_begin, layer_begin + len(kv))
        deed = memory.copy_from(kv, 0, slice(0, 2))
        writing = self.decoder.decode(memory.target(), [], [deed], after=await pages.wait_in(self._waiter))
        await finish(asyncio.wrap_future(writing), on_cancel=writing.cancel)
