"""The order of work on a real GPU: what an engine queues before a load or a save, and what it queues after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from device.emulated import ON_DEVICE, Device
from partitions import CHUNK, NAMESPACE, TOKENS, WHOLE, draw_kv, same_bits

from kvstore_s3 import KVStore, Settings
from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET as DECODER_BUDGET
from kvstore_s3.codec.device.decoder import DeviceDecoder
from kvstore_s3.codec.device.encoder import SMALLEST_BUDGET as ENCODER_BUDGET
from kvstore_s3.codec.device.encoder import DeviceEncoder
from kvstore_s3.codec.device.sources import RevokedError
from kvstore_s3.device_load import DevicePlace
from kvstore_s3.device_pages import PagedMemory
from kvstore_s3.device_save import DeviceKV
from kvstore_s3.transfer.ranges import Band

pytestmark = pytest.mark.skipif(not ON_DEVICE, reason="the emulation has no queues whose order could be wrong")

GPU = torch.device("cuda")
LONG = 100_000_000
"""Cycles for which a stream is kept busy: some 60 ms."""


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[KVStore]:
    async with KVStore.open(f"file://{path}", NAMESPACE, Settings(layer_group=2)) as store:
        yield store


async def test_blocks_are_written_behind_what_the_engine_queued_before(tmp_path: Path, device: Device) -> None:
    kv = draw_kv()
    caches = torch.zeros(4, 8, 4, 8, 16, dtype=torch.bfloat16, device=GPU)
    with DeviceDecoder(device.library, GPU, DECODER_BUDGET) as decoder:
        torch.cuda._sleep(LONG)
        caches.fill_(1)  # as an engine clears blocks
        ready = decoder.mark_current()

        def find_place(band: Band, number: int) -> DevicePlace:
            memory = PagedMemory.of(caches[band.layer_begin : band.layer_end], [2 * number + 1, 2 * number])
            return DevicePlace(memory, decoder, ready)

        async def take(layer_begin: int, number: int, values: torch.Tensor) -> None:
            raise AssertionError("every chunk has a place")

        async with opened(tmp_path) as store:
            await store.save(TOKENS, kv)
            hit = await store.lookup(TOKENS)
            async for _ in store.stream(hit, sink=take, find_place=find_place, device=decoder):
                pass
        out = torch.empty(4, 2, WHOLE, 4, 8, dtype=torch.bfloat16, device=GPU)
        PagedMemory.of(caches, [1, 0, 3, 2, 5, 4, 7, 6]).gather(out)
    assert same_bits(out.cpu(), kv[:, :, :WHOLE])
    assert WHOLE == 4 * CHUNK


async def test_a_save_reads_what_was_computed_before_it(tmp_path: Path, device: Device) -> None:
    kv = draw_kv()
    given, later = torch.zeros_like(kv, device=GPU), kv.to(GPU)
    with DeviceEncoder(device.library, GPU, ENCODER_BUDGET) as encoder:
        torch.cuda._sleep(LONG)
        given.copy_(later)
        on_device = DeviceKV.of(given, encoder)
        async with opened(tmp_path) as store:
            await store.save(TOKENS, on_device)
            assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :WHOLE])


@pytest.mark.parametrize("pause_s", [0.0, 0.0005, 0.002, 0.01])
async def test_what_overwrites_memory_that_was_taken_back_waits_for_its_readers(
    tmp_path: Path, device: Device, pause_s: float
) -> None:
    kv = draw_kv()
    given = kv.to(GPU)
    with DeviceEncoder(device.library, GPU, ENCODER_BUDGET) as encoder:
        async with opened(tmp_path) as store:
            on_device = DeviceKV.of(given, encoder)
            taking = asyncio.create_task(store.take(on_device))
            await asyncio.sleep(pause_s)
            encoder.hold_back([on_device.source])
            given.zero_()
            try:
                await taking
            except RevokedError:
                return  # some of it was not read yet, so nothing is saved
            await store.save(TOKENS, on_device)
            assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :WHOLE])


async def test_a_cuda_tensor_is_saved_as_it_is(tmp_path: Path) -> None:
    kv = draw_kv()
    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv.to(GPU))
        assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :WHOLE])
