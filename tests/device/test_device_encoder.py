"""Saves out of a device's memory: the same objects as those of KV on the host, from tensors, layers and blocks."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from codec.calibrations import make_calibration
from device.counting import CountingLibrary, opened
from device.emulated import ON_DEVICE, Device
from partitions import CHUNK, LAYOUT, TOKENS, WHOLE, draw_kv, part_of, same_bits

from kvstore_s3 import KVLayout, Namespace
from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET as DECODER_BUDGET
from kvstore_s3.codec.device.decoder import DeviceDecoder
from kvstore_s3.codec.device.encoder import SMALLEST_BUDGET, DeviceEncoder
from kvstore_s3.codec.device.library import Library
from kvstore_s3.codec.device.sources import EncodeSection, RevokedError, Source
from kvstore_s3.connectors.vllm.layouts import LAYOUTS, view_layers
from kvstore_s3.device_load import TensorMemory
from kvstore_s3.device_pages import BlocksCopy, PagedMemory
from kvstore_s3.device_save import DeviceKV, LayersMemory
from kvstore_s3.errors import DeviceError, InvalidArgumentError, StoreUnavailableError
from kvstore_s3.layout import Shard

MEMORY = torch.device("cuda" if ON_DEVICE else "cpu")
BLOCK_IDS = [7, 2, 11, 0, 18, 5, 3, 14, 9]
"""Of eight tokens each."""


@pytest.fixture
def library(device: Device) -> CountingLibrary:
    return CountingLibrary(device.library.path, emulated=device.library.emulated)


@pytest.fixture
def encoder(library: CountingLibrary) -> Iterator[DeviceEncoder]:
    with DeviceEncoder(library, MEMORY, SMALLEST_BUDGET) as encoder:
        yield encoder


def objects_in(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def of_tensor(kv: torch.Tensor, encoder: DeviceEncoder) -> DeviceKV:
    return DeviceKV.of(kv.to(MEMORY), encoder)


def of_layers(kv: torch.Tensor, encoder: DeviceEncoder) -> DeviceKV:
    """As a model's cache has them: [heads, tokens, dim]."""
    layers = [[half.transpose(0, 1).contiguous().to(MEMORY).transpose(0, 1) for half in layer] for layer in kv]
    memory = LayersMemory(tuple((keys, values) for keys, values in layers))
    assert memory.alike
    return DeviceKV.of_layers(memory, encoder)


def of_blocks(order: str, begin: int = 0) -> Callable[[torch.Tensor, DeviceEncoder], DeviceKV]:
    """In an engine's blocks, from token `begin` of the first one on."""

    def make(kv: torch.Tensor, encoder: DeviceEncoder) -> DeviceKV:
        layers, _, tokens, heads, dim = kv.shape
        storage = torch.zeros(layers * 19 * heads * 8 * 2 * dim, dtype=kv.dtype, device=MEMORY)
        shape = {"layers": layers, "blocks": 19, "heads": heads, "block_tokens": 8, "head_dim": dim}
        caches = view_layers(storage, order, **shape)
        padded = torch.zeros(layers, 2, 8 * len(BLOCK_IDS), heads, dim, dtype=kv.dtype)
        padded[:, :, begin : begin + tokens] = kv
        BlocksCopy(padded, PagedMemory.of(caches, BLOCK_IDS), slice(0, 2)).queue()

        def find(first: int, end: int) -> tuple[PagedMemory, int]:
            first, end = begin + first, begin + end
            return PagedMemory.of(caches, BLOCK_IDS[first // 8 : -(-end // 8)]), first % 8

        return DeviceKV(encoder, find, kv.shape, kv.dtype, after=encoder.mark_current())

    return make


PLACES = {
    "tensor": of_tensor,
    "layers": of_layers,
    **{f"blocks {order}": of_blocks(order) for order in LAYOUTS},
    "chunks that begin within a block": of_blocks("LBNHC", 3),
}


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


@pytest.mark.parametrize("calibrated", [False, True])
async def test_lossy_profiles_are_encoded_by_the_cpu(tmp_path: Path, encoder: DeviceEncoder, calibrated: bool) -> None:
    kv = draw_kv()
    namespace = Namespace(model="parted", revision="1", layout=LAYOUT, chunk_tokens=CHUNK)
    calibration = make_calibration(
        LAYOUT, "head", lambda seed: draw_kv(seed=seed), layer_group=2, namespace=namespace.digest
    )
    for name, values in (("host", kv), ("device", of_blocks("BLHNC", 5)(kv[:, :, :WHOLE], encoder))):
        async with opened(tmp_path / name, profile="near-lossless") as store:
            if calibrated:
                await store.calibrations.publish(calibration.to_bytes())
            await store.save(TOKENS, values)
    names = [name for name in objects_in(tmp_path / "host") if "current" not in name]
    assert {name: objects_in(tmp_path / "device")[name] for name in names} == {
        name: objects_in(tmp_path / "host")[name] for name in names
    }


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
    assert all(encoder.takes(memory, section) for section in sections)
    batches = encoder.encode(on_device.source, memory, sections)
    assert len(batches) > 2
    payloads = [payload for batch in batches for payload in batch.result()]
    assert len(payloads) == 8
    assert all(payloads)
    assert library.calls == len(batches)


def test_a_section_larger_than_a_slot_is_not_taken(encoder: DeviceEncoder) -> None:
    memory = TensorMemory(torch.zeros(1, 2, 4096, 2, 64, dtype=torch.bfloat16, device=MEMORY))
    assert encoder.takes(memory, EncodeSection(0, 1, 0, 64))
    assert not encoder.takes(memory, EncodeSection(0, 1, 0, 4096))


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
        (batch,) = encoder.encode(Source(encoder.mark_current()), memory, [EncodeSection(0, 2, 0, 16)])
        with pytest.raises(DeviceError, match="has not come to a head"):
            batch.result()
