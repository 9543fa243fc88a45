"""One asyncio thread for synchronous callers: `connect` gives KVStore's verbs, blocking."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

from kvstore_s3.config import Settings
from kvstore_s3.device_load import Device
from kvstore_s3.device_save import DeviceKV
from kvstore_s3.errors import DeviceError, StoreUnavailableError
from kvstore_s3.layout import Shard
from kvstore_s3.namespace import Namespace
from kvstore_s3.store import Hit, KVStore, LayerGroup, Pace, Saved, TokenIds

T = TypeVar("T")

_CLOSED = "the store is closed; connect again"
_INHERITED = "the store belongs to the process that this one was forked from; connect again"


class Runtime:
    """An event loop in a daemon thread. `close` cancels what is still running and waits for it.

    `initializer` is the first thing that the thread does; threads that it starts later inherit what that set. The GPU
    that the caller uses is the thread's, too, so that `cuda` is the same for both.
    """

    def __init__(self, initializer: Callable[[], None] | None = None) -> None:
        self._process = os.getpid()  # a fork has no such thread
        self._closing = False
        self._submitting = threading.Lock()  # what is submitted after the loop's end would be waited for forever
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvstore-s3", daemon=True)
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
        if gpu != 0:  # with which threads begin: to set that would make a context there, if it is not the one in use
            self._loop.call_soon(torch.cuda.set_device, gpu)
        if initializer is not None:
            self._loop.call_soon(initializer)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start `work` on the loop; cancelling the future cancels it there."""
        self._check_open(work)
        with self._submitting:
            self._check_open(work)
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` and wait. An interrupt (Ctrl-C) cancels it and waits until it has cleaned up.

        Raises `StoreUnavailableError` where the runtime is closed before it has ended.
        """
        self._check_open(work)
        started: list[asyncio.Task[Any]] = []
        future = self.submit(_note_task(work, started))
        try:
            return future.result()
        except BaseException as error:
            if future.cancelled():  # by `close`, which waited for its end
                work.close()
                raise StoreUnavailableError(_CLOSED) from error
            if future.cancel():
                self.submit(_settle(started)).result()
                work.close()
            raise

    def close(self) -> None:
        if self.closed or self.inherited:
            return
        with self._submitting:
            self._closing = True
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    @property
    def closed(self) -> bool:
        return self._closing

    @property
    def inherited(self) -> bool:
        """Whether this process was forked from the one that it works in."""
        return os.getpid() != self._process

    def _check_open(self, work: Coroutine[Any, Any, Any]) -> None:
        if self.inherited or self.closed:
            work.close()
            raise StoreUnavailableError(_INHERITED if self.inherited else _CLOSED)


class SyncKVStore:
    """KVStore for synchronous callers; made by `connect`. Verbs may be called from any thread."""

    def __init__(self, kv: KVStore, runtime: Runtime) -> None:
        self.kv = kv
        self.runtime = runtime

    @property
    def namespace(self) -> Namespace:
        return self.kv.namespace

    def lookup(self, token_ids: TokenIds, *, salt: str | bytes | None = None, thorough: bool = False) -> Hit:
        return self.runtime.run(self.kv.lookup(token_ids, salt=salt, thorough=thorough))

    def lookup_keys(self, keys: Sequence[bytes], *, first_token: int = 0, thorough: bool = False) -> Hit:
        return self.runtime.run(self.kv.lookup_keys(keys, first_token=first_token, thorough=thorough))

    def load(self, hit: Hit, *, pace: Pace | None = None, device: Device | None = None) -> torch.Tensor:
        return _use_here(self.runtime.run(self.kv.load(hit, pace=pace, device=device)))

    def stream(
        self, hit: Hit, *, first_token: int = 0, pace: Pace | None = None, device: Device | None = None
    ) -> Iterator[LayerGroup]:
        groups = self.kv.stream(hit, first_token=first_token, pace=pace, device=device)
        try:
            while (group := self.runtime.run(_next(groups))) is not None:
                _use_here(group.kv)
                yield group
        finally:
            with suppress(StoreUnavailableError):  # closed meanwhile: that ended it
                self.runtime.run(_close(groups))

    def save(
        self,
        token_ids: TokenIds,
        kv: torch.Tensor | DeviceKV,
        *,
        salt: str | bytes | None = None,
        first_token: int = 0,
        prefix_quality: str = "lossless",
    ) -> Saved:
        _put_in_order(kv)
        saved = self.kv.save(token_ids, kv, salt=salt, first_token=first_token, prefix_quality=prefix_quality)
        return self.runtime.run(saved)

    def save_keys(
        self,
        keys: Sequence[bytes],
        kv: torch.Tensor | DeviceKV,
        *,
        first_token: int = 0,
        prefix_quality: str = "lossless",
    ) -> Saved:
        _put_in_order(kv)
        return self.runtime.run(self.kv.save_keys(keys, kv, first_token=first_token, prefix_quality=prefix_quality))

    def stats(self) -> dict[str, float]:
        return self.kv.stats()


def _use_here(values: torch.Tensor) -> torch.Tensor:
    """Values that the store's thread allocated on its stream: their memory is free once the caller's is done, too."""
    if values.is_cuda:
        values.record_stream(torch.cuda.current_stream(values.device))
    return values


def _put_in_order(kv: torch.Tensor | DeviceKV) -> None:
    """What the caller's stream computes now is there for the store, whose thread reads behind the default stream.

    Raises `DeviceError`.
    """
    if isinstance(kv, torch.Tensor) and kv.is_cuda:
        try:
            event = torch.cuda.current_stream(kv.device).record_event()
            torch.cuda.default_stream(kv.device).wait_event(event)
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            raise DeviceError(f"the device failed at an event: {why}") from error


@contextmanager
def connect(
    url: str,
    namespace: Namespace,
    settings: Settings | None = None,
    *,
    probe: bool = True,
    shard: Shard | None = None,
    initializer: Callable[[], None] | None = None,
) -> Iterator[SyncKVStore]:
    """Open a store for synchronous code: `with connect("file:///dir", namespace) as store: ...`.

    The arguments and the errors are those of `KVStore.open`. `initializer`: called first by the thread that the store
    will work in, as for `ThreadPoolExecutor`; the store's other threads inherit its cores and priority.
    """
    runtime = Runtime(initializer)
    try:
        kv = KVStore.open(url, namespace, settings, probe=probe, shard=shard)
        runtime.run(kv.__aenter__())
        try:
            yield SyncKVStore(kv, runtime)
        finally:
            if not runtime.inherited:
                runtime.run(kv.__aexit__(None, None, None))
    finally:
        runtime.close()


async def _note_task(work: Coroutine[Any, Any, T], started: list[asyncio.Task[Any]]) -> T:
    started.extend(task for task in [asyncio.current_task()] if task)
    return await work


async def _settle(started: list[asyncio.Task[Any]]) -> None:
    if started:
        await asyncio.wait(started)


async def _next(groups: AsyncIterator[LayerGroup]) -> LayerGroup | None:
    return await anext(groups, None)


async def _close(groups: AsyncGenerator[LayerGroup, None]) -> None:
    await groups.aclose()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
