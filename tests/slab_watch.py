"""Finds slabs that were leased and never given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvstore_s3.transfer.buffers import SlabPool


@contextmanager
def watch_slabs() -> Iterator[None]:
    """Fail at the end if any pool that was made meanwhile has bytes on lease, or someone waiting."""
    pools: list[SlabPool] = []
    original = SlabPool.__init__

    def remember(self: SlabPool, budget: int, *, pin: bool | None = None) -> None:
        original(self, budget, pin=pin)
        pools.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlabPool, "__init__", remember)
        yield
    for pool in pools:
        if pool.leased or pool.waiting:
            pytest.fail(f"leaked slabs: {pool.leased} of {pool.budget} bytes on lease, {pool.waiting} waiting")
