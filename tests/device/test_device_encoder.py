"""Saves out of a device's memory: the same objects as those of KV on the host, from tensors, layers and blocks."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from device.counting import CountingLibrary, opened
from device.device_kv import MEMORY, PLACES, objects_in, of_blocks, of_tensor
from device.emulated import Device
from partitions import LAYOUT, TOKENS, WHOLE, draw_kv, part_of, same_bits

from kvstore_s3 import KVLayout
from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET as DECODER_BUDGET
from kvstore_s3.codec.device.decoder import DeviceDecoder
from kvstore_s3.codec.device.encode_batch import CONTROL_BYTES
from kvstore_s3.codec.device.encoder import SMALLEST_BUDGET, DeviceEncoder
from kvstore_s3.codec.device.library import Library
from kvstore_s3.codec.device.sources import EncodeSection, RevokedError, Source
from kvstore_s3.device_load import TensorMemory
from kvstore_s3.device_save import DeviceKV
from kvstore_s3.errors import DeviceError, InvalidArgumentError, StoreUnavailableError
from kvstore_s3.layout import Shard


@pytest.fixture
def library(device: Device) -> CountingLibrary:
    return CountingLibrary(device.library.path, emulated=device.library.emulated)


@pytest.fixture
def encoder(library: CountingLibrary) -> Iterator[DeviceEncoder]:
    with DeviceEncoder(library, MEMORY, SMALLEST_BUDGET) as encoder:
        yield encoder


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("taken", [False, True], ids=["as it goes", "taken before"])
async def test_objects_are_those_of_kv_on_the_host(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary, place: str, taken: bool
) -> None:
    kv = draw_kv(tokens=66)
    async with opened(tmp_path / "host") as store:
        await store.save(TOKENS, kv)
    async with opened(tmp_path / "device") as store:
        on_device = PLACES[place](kv, encoder)
        if taken:
            await store.take(on_device)
        saved = await store.save(TOKENS, on_device)
    assert (saved.chunks_new, saved.quality) == (4, "lossless")
    assert objects_in(tmp_path / "device") == objects_in(tmp_path / "host")
    assert library.heads == 4 * 2 * LAYOUT.kv_heads


async def test_what_is_taken_may_be_overwritten(tmp_path: Path, encoder: DeviceEncoder) -> None:
    kv = draw_kv()
    async with opened(tmp_path) as store:
        given = kv.clone().to(MEMORY)
        on_device = DeviceKV.of(given, encoder)
        await store.take(on_device)
        given.zero_()
        await store.save(TOKENS, on_device)
        assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :WHOLE])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float8_e4m3fn"])
async def test_what_kernels_do_not_encode_the_cpu_does(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary, dtype: str
) -> None:
    layout = KVLayout(4, 4, 8, dtype)
    kv = draw_kv(layout)
    for name, values in (("host", kv), ("device", of_tensor(kv, encoder))):
        async with opened(tmp_path / name, layout) as store:
            await store.save(TOKENS, values)
    assert objects_in(tmp_path / "device") == objects_in(tmp_path / "host")
    assert library.heads == 0


async def test_sections_that_coding_makes_no_shorter_are_stored_raw(tmp_path: Path, encoder: DeviceEncoder) -> None:
    kv = draw_kv()
    bits = torch.randint(-(2**15), 2**15, kv[2:].shape, dtype=torch.int16, generator=torch.Generator().manual_seed(1))
    kv[2:] = bits.view(torch.bfloat16)
    for name, values in (("host", kv), ("device", of_blocks("LBHNC", 1)(kv, encoder))):
        async with opened(tmp_path / name) as store:
            await store.save(TOKENS, values)
            hit = await store.lookup(TOKENS)
            assert [section.codec for section in hit.chunks[0].table.sections] == [1, 0]
    assert objects_in(tmp_path / "device") == objects_in(tmp_path / "host")


async def test_a_rank_saves_its_rectangle(tmp_path: Path, encoder: DeviceEncoder) -> None:
    kv, shard = draw_kv(), Shard(1, 4, 2, 4)
    for name, device in (("host", False), ("device", True)):
        async with opened(tmp_path / name, shard=shard) as store:
            values = part_of(kv, shard)
            await store.save(TOKENS, of_blocks("BLNHC")(values, encoder) if device else values)
    assert objects_in(tmp_path / "device") == objects_in(tmp_path / "host")


async def test_a_device_that_fails_leaves_the_encoding_to_the_cpu(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    kv = draw_kv()
    library.broken = True
    with caplog.at_level(logging.WARNING, "kvstore_s3"):
        async with opened(tmp_path) as store:
            assert (await store.save(TOKENS, of_tensor(kv, encoder))).chunks_new == 4
            assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :WHOLE])
    assert "KV is coded by the CPU: kvs_lossless_encode failed with CUDA error 700" in caplog.messages


async def test_where_staging_memory_does_not_fit_the_cpu_codes(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = torch.empty

    def refuse_large(*shape: Any, **options: Any) -> torch.Tensor:
        if shape[0] == CONTROL_BYTES + encoder._data_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", refuse_large)
    kv = draw_kv()
    async with opened(tmp_path) as store:
        await store.save(TOKENS, of_tensor(kv, encoder))
        found = await store.load(await store.lookup(TOKENS))
    assert same_bits(found, kv[:, :, :WHOLE])
    assert library.heads == 0


async def test_memory_that_was_taken_back_is_not_read(tmp_path: Path, encoder: DeviceEncoder) -> None:
    async with opened(tmp_path) as store:
        on_device = of_tensor(draw_kv(), encoder)
        encoder.hold_back([on_device.source])
        with pytest.raises(RevokedError):
            await store.take(on_device)


async def test_without_a_library_the_cpu_encodes(tmp_path: Path) -> None:
    kv = draw_kv()
    with DeviceEncoder(None, MEMORY, SMALLEST_BUDGET) as encoder:
        async with opened(tmp_path) as store:
            await store.save(TOKENS, of_tensor(kv, encoder))
            assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :WHOLE])


async def test_a_store_has_one_encoder_for_each_device(tmp_path: Path, library: CountingLibrary) -> None:
    with DeviceDecoder(library, MEMORY, DECODER_BUDGET) as decoder:
        async with opened(tmp_path) as store:
            encoder = store.encoder_for(decoder)
            assert encoder is not None
            assert store.encoder_for(decoder) is encoder
            assert store.encoder_for("cpu") is None
            await store.save(TOKENS, of_tensor(draw_kv(), encoder))
    assert library.heads == 4 * 2 * LAYOUT.kv_heads
    with pytest.raises(StoreUnavailableError):
        encoder.fetch(of_tensor(draw_kv(), encoder).source, TensorMemory(draw_kv()), draw_kv())


def test_more_than_a_slot_goes_in_several_batches(encoder: DeviceEncoder, library: CountingLibrary) -> None:
    kv = draw_kv(KVLayout(8, 2, 16, "bfloat16"), 240)  # 61 KB a layer, two layers with scratch 250 KB
    memory = TensorMemory(kv.to(MEMORY))
    sections = [EncodeSection(layer, 1, 0, 240) for layer in range(8)]
    on_device = of_tensor(kv, encoder)
    coded = encoder.encode(on_device.source, memory, sections).result()
    assert [levels and len(levels) for levels in coded] == [1] * 8
    assert 2 < library.calls < 8


def test_a_section_larger_than_a_slot_is_for_the_cpu(encoder: DeviceEncoder, library: CountingLibrary) -> None:
    values = torch.zeros(3, 2, 4096, 2, 64, dtype=torch.bfloat16, device=MEMORY)
    sections = [EncodeSection(0, 1, 0, 64), EncodeSection(1, 1, 0, 4096), EncodeSection(2, 1, 64, 64)]
    on_device = DeviceKV.of(values, encoder)
    coded = encoder.encode(on_device.source, TensorMemory(values), sections).result()
    assert [levels is None for levels in coded] == [False, True, False]
    assert library.heads == 4


def test_a_budget_that_holds_nothing_is_refused(device: Device) -> None:
    with pytest.raises(InvalidArgumentError, match="too few"):
        DeviceEncoder(device.library, MEMORY, SMALLEST_BUDGET - 1)


def test_a_kernel_that_never_ran_is_not_taken_for_a_good_one(tmp_path: Path) -> None:
    source, built = tmp_path / "library.cpp", tmp_path / "library.so"
    source.write_text(
        'extern "C" int kvs_lossless_encode(void*, unsigned, void*, void*, void*) { return 0; }'
        'extern "C" unsigned long kvs_lossless_encode_scratch(unsigned long, unsigned long) { return 64; }'
    )
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
    memory = TensorMemory(draw_kv().to(MEMORY))
    with DeviceEncoder(Library(built, emulated=True), MEMORY, SMALLEST_BUDGET) as encoder:
        coded = encoder.encode(Source(encoder.mark_current()), memory, [EncodeSection(0, 2, 0, 16)])
        with pytest.raises(DeviceError, match="has not come to a head"):
            coded.result()
