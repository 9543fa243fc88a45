"""Loads and saves where a GPU's queues run late, in every order that was not ruled out: see late_streams.py.

Every engine here computes in a queue too: it clears blocks before they are loaded, and uses them for others after they
were saved, without waiting for anything but what the store told it.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from codec.calibrations import make_calibration
from device.counting import CountingLibrary, opened
from device.emulated import ON_DEVICE, Device
from device.late_streams import LateDevice, late_device
from partitions import CHUNK, LAYOUT, NAMESPACE, TOKENS, WHOLE, damage, draw_kv, flip_last_section, same_bits

from kvstore_s3 import KVStore
from kvstore_s3.arena import Arena
from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.codec.device.batch import Slot
from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET as DECODER_BUDGET
from kvstore_s3.codec.device.decoder import DeviceDecoder
from kvstore_s3.codec.device.encoder import SLOTS as ENCODER_SLOTS
from kvstore_s3.codec.device.encoder import SMALLEST_BUDGET as ENCODER_BUDGET
from kvstore_s3.codec.device.encoder import DeviceEncoder
from kvstore_s3.codec.device.library import Pages
from kvstore_s3.codec.device.sources import RevokedError, Source
from kvstore_s3.codec.device.streams import Mark, Streams
from kvstore_s3.device_load import DevicePlace
from kvstore_s3.device_pages import PagedMemory
from kvstore_s3.device_save import DeviceKV
from kvstore_s3.errors import DeviceError
from kvstore_s3.hits import Hit
from kvstore_s3.transfer.ranges import Band

pytestmark = [
    pytest.mark.skipif(ON_DEVICE, reason="a GPU has queues of its own"),
    pytest.mark.usefixtures("no_leaks"),
]

HOST = torch.device("cpu")
BLOCKS, BLOCK_TOKENS = 12, 8
TABLE = [5, 3, 8, 0, 7, 2, 10, 1]
"""Blocks of the prompt's whole chunks; four more are others'."""
SPANS = ["channel", "head", "all"]


@pytest.fixture
def library(device: Device) -> CountingLibrary:
    return CountingLibrary(device.library.path, emulated=True)


@pytest.fixture(params=range(3), ids=lambda seed: f"order {seed}")
def late(request: pytest.FixtureRequest, library: CountingLibrary) -> Iterator[LateDevice]:
    with late_device(library, request.param) as late:
        yield late


@pytest.fixture
def decoder(library: CountingLibrary, late: LateDevice) -> Iterator[DeviceDecoder]:
    with DeviceDecoder(library, HOST, DECODER_BUDGET) as decoder:
        yield decoder


@pytest.fixture
def encoder(library: CountingLibrary, late: LateDevice) -> Iterator[DeviceEncoder]:
    with DeviceEncoder(library, HOST, 4 * ENCODER_BUDGET) as encoder:
        yield encoder


@pytest.fixture(autouse=True)
def _slabs_are_spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read from the store is gone as soon as others may have its memory."""
    free = Arena.free

    def spoil(arena: Arena, block: memoryview) -> None:
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(block)), 0xE3, len(block))
        free(arena, block)

    monkeypatch.setattr(Arena, "free", spoil)


@pytest.fixture(scope="module")
def calibrations() -> dict[str, list[Calibration]]:
    """Two of each span, and none."""

    def make(span: str, seed: int) -> Calibration:
        return make_calibration(
            LAYOUT, span, lambda _: draw_kv(seed=seed), layer_group=2, relative_step=0.02, namespace=NAMESPACE.digest
        )

    return {"none": [], **{span: [make(span, seed) for seed in (1, 2)] for span in SPANS}}


class Engine:
    """Caches of all layers, of which nothing is known on the host."""

    def __init__(self, late: LateDevice) -> None:
        self.late = late
        shape = (LAYOUT.layers, BLOCKS, LAYOUT.kv_heads, BLOCK_TOKENS, 2 * LAYOUT.head_dim)
        self.caches = late.adopt(torch.full(shape, 9.0, dtype=torch.bfloat16))

    def fill(self, value: float) -> None:
        """Let all blocks be somebody else's."""
        with self.late.computing():
            self.caches.fill_(value)

    def write(self, kv: torch.Tensor) -> None:
        """Compute the prompt's KV."""
        memory, values = PagedMemory.of(self.caches, TABLE), self.late.on_device(kv[:, :, :WHOLE])
        with self.late.computing():
            memory.copy_from(values, 0, slice(0, 2)).queue()

    def read(self) -> torch.Tensor:
        """Use the prompt's KV: what this gives is there once the engine's queue has come here."""
        out = self.late.adopt(torch.zeros(LAYOUT.layers, 2, WHOLE, LAYOUT.kv_heads, LAYOUT.head_dim).bfloat16())
        with self.late.computing():
            PagedMemory.of(self.caches, TABLE).gather(out)
        return out

    def place(
        self, band: Band, number: int, decoder: DeviceDecoder, after: Mark | None, on_queued: object = None
    ) -> DevicePlace:
        blocks = TABLE[2 * number : 2 * number + 2]
        memory = PagedMemory.of(self.caches[band.layer_begin : band.layer_end], blocks)
        return DevicePlace(memory, decoder, after, on_queued=on_queued)  # type: ignore[arg-type]

    def kv(self, encoder: DeviceEncoder, tokens: int = WHOLE) -> DeviceKV:
        """What the queue has come to, to be saved."""

        def find(begin: int, end: int) -> tuple[PagedMemory, int]:
            return PagedMemory.of(self.caches, TABLE[begin // BLOCK_TOKENS : -(-end // BLOCK_TOKENS)]), 0

        shape = (LAYOUT.layers, 2, tokens, LAYOUT.kv_heads, LAYOUT.head_dim)
        return DeviceKV(encoder, find, shape, torch.bfloat16, after=encoder.mark_current())

    def others(self) -> torch.Tensor:
        """Blocks that are not the prompt's."""
        return self.caches[:, [block for block in range(BLOCKS) if block not in TABLE]]


@pytest.fixture
def engine(late: LateDevice) -> Engine:
    return Engine(late)


async def load_in_place(
    store: KVStore, hit: Hit, engine: Engine, decoder: DeviceDecoder, on_queued: object = None
) -> None:
    """Into blocks that the engine has just cleared."""
    engine.fill(1)
    ready = decoder.mark_current()

    async def refuse(layer_begin: int, number: int, values: torch.Tensor) -> None:
        raise AssertionError("every chunk has a place")

    def find_place(band: Band, number: int) -> DevicePlace:
        return engine.place(band, number, decoder, ready, on_queued)

    stream = store.stream(hit, by_layer=True, sink=refuse, find_place=find_place, device=decoder)
    async for _ in stream:
        pass


def close(found: torch.Tensor, expected: torch.Tensor, span: str) -> bool:
    """Whether values are the same but for the rounding of products, and of what tensor cores multiply (span all)."""
    off, often = (2**-10 * float(expected.abs().max()), 0.3) if span == "all" else (1e-5, 0.01)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=off)
    return float((found != expected).float().mean()) < often


async def test_a_load_is_there_when_it_says_so(tmp_path: Path, library: CountingLibrary, late: LateDevice) -> None:
    kv = draw_kv()
    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        hit = await store.lookup(TOKENS)
        for _ in range(6):  # slots that are new
            with DeviceDecoder(library, HOST, DECODER_BUDGET) as decoder:
                assert same_bits(await store.load(hit, device=decoder), kv[:, :, :WHOLE])
    assert late.launches


@pytest.mark.parametrize("side_by_side", [True, False])
async def test_what_bounds_a_launch_bounds_all_where_nothing_runs_side_by_side(
    tmp_path: Path, library: CountingLibrary, late: LateDevice, side_by_side: bool
) -> None:
    kv, before = draw_kv(), late.streams_launched_on
    async with opened(tmp_path) as store:
        with DeviceEncoder(library, HOST, 4 * ENCODER_BUDGET, side_by_side=side_by_side) as encoder:
            saves = [store.save([one, *TOKENS[1:]], DeviceKV.of(late.on_device(kv), encoder)) for one in range(4)]
            await asyncio.gather(*saves)
        coded = late.streams_launched_on - before
        hits = [await store.lookup([one, *TOKENS[1:]]) for one in range(4)]
        with DeviceDecoder(library, HOST, DECODER_BUDGET, side_by_side=side_by_side) as decoder:
            found = await asyncio.gather(*(store.load(hit, device=decoder) for hit in hits for _ in range(4)))
    assert all(same_bits(one, kv[:, :, :WHOLE]) for one in found)
    decoded = late.streams_launched_on - before - coded
    assert (len(coded), len(decoded)) == (1, 1) if not side_by_side else len(decoded) > 1


async def test_slots_are_not_used_again_before_their_batch_has_ended(
    tmp_path: Path, decoder: DeviceDecoder, late: LateDevice
) -> None:
    kv = draw_kv()
    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        hit = await store.lookup(TOKENS)
        late.may_run.clear()
        loads = []
        for _ in range(10):
            loads.append(asyncio.create_task(store.load(hit, device=decoder)))
            await asyncio.sleep(0.01)
        late.may_run.set()
        assert all(same_bits(found, kv[:, :, :WHOLE]) for found in await asyncio.gather(*loads))


@pytest.mark.parametrize("span", ["none", "head", "all"])
async def test_lossy_values_are_there_with_what_they_need_of_calibrations(
    tmp_path: Path, decoder: DeviceDecoder, late: LateDevice, calibrations: dict[str, list[Calibration]], span: str
) -> None:
    kv, before = draw_kv(seed=9), late.launches
    async with opened(tmp_path, profile="near-lossless") as store:
        for number, calibration in enumerate(calibrations[span] or [None]):
            if calibration is not None:
                await store.calibrations.publish(calibration.to_bytes())
            tokens = [number, *TOKENS[1:]]
            await store.save(tokens, kv)
            hit = await store.lookup(tokens)
            on_host = await store.load(hit)
            found = await asyncio.gather(*(store.load(hit, device=decoder) for _ in range(3)))
            assert all(close(one, on_host, span) for one in found)
    assert late.launches > before


@pytest.mark.parametrize("profile", ["lossless", "near-lossless"])
async def test_slots_are_used_again_by_loads_beside_each_other(
    tmp_path: Path, decoder: DeviceDecoder, profile: str
) -> None:
    prompts = [[number, *TOKENS[1:]] for number in range(4)]
    async with opened(tmp_path, profile=profile) as store:
        for number, prompt in enumerate(prompts):
            await store.save(prompt, draw_kv(seed=number))
        hits = [await store.lookup(prompt) for prompt in prompts]
        expected = [await store.load(hit) for hit in hits]
        for _ in range(2):
            found = await asyncio.gather(*(store.load(hit, device=decoder) for hit in hits))
            assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))
            del found


async def test_blocks_are_written_behind_what_the_engine_queued_before(
    tmp_path: Path, decoder: DeviceDecoder, engine: Engine
) -> None:
    kv = draw_kv()
    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        await load_in_place(store, await store.lookup(TOKENS), engine, decoder)
        found = engine.read()
    engine.late.default.synchronize()
    assert same_bits(found, kv[:, :, :WHOLE])
    assert (engine.others() == 1).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "without kernels"])
async def test_a_step_that_was_told_what_to_wait_for_uses_right_values(
    tmp_path: Path, library: CountingLibrary, engine: Engine, dtype: str
) -> None:
    """As an engine does that loads by layer: it goes on as soon as all is queued."""
    kv, loop = draw_kv(), asyncio.get_running_loop()
    queued: asyncio.Queue[Sequence[Mark]] = asyncio.Queue()

    def show(_: Future[None], marks: Sequence[Mark]) -> None:
        loop.call_soon_threadsafe(queued.put_nowait, list(marks))

    with DeviceDecoder(library if dtype == "bfloat16" else None, HOST, DECODER_BUDGET) as decoder:
        async with opened(tmp_path) as store:
            await store.save(TOKENS, kv)
            hit = await store.lookup(TOKENS)
            loading = asyncio.create_task(load_in_place(store, hit, engine, decoder, show))
            for _ in range(2 * WHOLE // CHUNK):  # two bands of each chunk
                for mark in await asyncio.wait_for(queued.get(), 60):
                    decoder.hold_current(mark)
            found = engine.read()
            await loading
    engine.late.default.synchronize()
    assert same_bits(found, kv[:, :, :WHOLE])


async def test_without_kernels_copies_are_in_the_same_queues(tmp_path: Path, engine: Engine) -> None:
    kv = draw_kv()
    with DeviceDecoder(None, HOST, DECODER_BUDGET) as decoder, DeviceEncoder(None, HOST, ENCODER_BUDGET) as encoder:
        async with opened(tmp_path) as store:
            engine.write(kv)
            on_device = engine.kv(encoder)
            await store.take(on_device)
            engine.fill(2)
            await store.save(TOKENS[:WHOLE], on_device)
            hit = await store.lookup(TOKENS)
            assert same_bits(await store.load(hit, device=decoder), kv[:, :, :WHOLE])
            await load_in_place(store, hit, engine, decoder)
            found = engine.read()
    engine.late.default.synchronize()
    assert same_bits(found, kv[:, :, :WHOLE])


@pytest.mark.parametrize("mode", ["lossless", "none", "channel", "all"])
async def test_a_save_reads_what_was_computed_before_and_nothing_that_comes_after(
    tmp_path: Path,
    encoder: DeviceEncoder,
    engine: Engine,
    calibrations: dict[str, list[Calibration]],
    mode: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    profile = "lossless" if mode == "lossless" else "near-lossless"
    for name in ("device", "host"):
        async with opened(tmp_path / name, profile=profile) as store:
            for number, calibration in enumerate(calibrations.get(mode) or [None]):
                if calibration is not None:
                    await store.calibrations.publish(calibration.to_bytes())
                await store.calibrations.current()
                kv, tokens = draw_kv(seed=number), [number, *TOKENS[1:]]
                if name == "host":
                    await store.save(tokens, kv)
                    continue
                engine.write(kv)
                on_device = engine.kv(encoder)
                await store.take(on_device)
                engine.fill(2)  # the blocks are others' now
                await store.save(tokens[:WHOLE], on_device)
    assert "coded by the CPU" not in caplog.text
    for number in range(2 if mode in SPANS else 1):
        values = []
        for name in ("device", "host"):
            async with opened(tmp_path / name, profile=profile) as store:
                values.append(await store.load(await store.lookup([number, *TOKENS[1:]])))
        assert same_bits(*values) if mode in ("lossless", "none", "channel") else close(*values, mode)


@pytest.mark.parametrize("pause_s", [0.0, 0.002, 0.01])
async def test_what_overwrites_memory_that_was_taken_back_waits_for_its_readers(
    tmp_path: Path, encoder: DeviceEncoder, engine: Engine, pause_s: float
) -> None:
    kv = draw_kv()
    async with opened(tmp_path) as store:
        engine.write(kv)
        on_device = engine.kv(encoder)
        taking = asyncio.create_task(store.take(on_device))
        await asyncio.sleep(pause_s)
        await asyncio.to_thread(encoder.hold_back, [on_device.source])
        engine.fill(2)
        try:
            await taking
        except RevokedError:
            return  # some of it was not read yet, so nothing is saved
        await store.save(TOKENS[:WHOLE], on_device)
        assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :WHOLE])


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "copies"])
async def test_what_was_queued_of_memory_that_was_taken_back_is_read_before_it_is_overwritten(
    tmp_path: Path, library: CountingLibrary, engine: Engine, kernels: bool
) -> None:
    kv, late, loop = draw_kv(), engine.late, asyncio.get_running_loop()
    queued, read = asyncio.Event(), Source.reading

    @contextmanager
    def note(source: Source, streams: Streams) -> Iterator[None]:
        with read(source, streams):
            yield
        loop.call_soon_threadsafe(queued.set)

    with (
        DeviceEncoder(library if kernels else None, HOST, 4 * ENCODER_BUDGET) as encoder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(Source, "reading", note)
        async with opened(tmp_path) as store:
            engine.write(kv)
            on_device = engine.kv(encoder, CHUNK)
            late.may_run.clear()
            taking = asyncio.create_task(store.take(on_device))
            await asyncio.wait_for(queued.wait(), 60)
            encoder.hold_back([on_device.source])
            engine.fill(2)
            late.may_run.set()
            late.default.synchronize()
            await taking
            await store.save(TOKENS[:CHUNK], on_device)
            assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :CHUNK])


async def test_damage_ends_a_load_before_it(tmp_path: Path, decoder: DeviceDecoder) -> None:
    kv = draw_kv()
    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        await damage(store, (await store.lookup(TOKENS)).chunks[2].object_key, flip_last_section)
    async with opened(tmp_path) as store:
        found = await store.load(await store.lookup(TOKENS), device=decoder)
    assert same_bits(found, kv[:, :, : 2 * CHUNK])


@pytest.mark.parametrize("pause_s", [0.0, 0.005, 0.01, 0.02])
async def test_a_cancelled_load_writes_nothing_any_more(
    tmp_path: Path, decoder: DeviceDecoder, engine: Engine, pause_s: float
) -> None:
    kv = draw_kv()
    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        hit = await store.lookup(TOKENS)
        load = asyncio.create_task(load_in_place(store, hit, engine, decoder))
        await asyncio.sleep(pause_s)
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
        engine.fill(2)
        engine.late.finish()
        assert (engine.caches == 2).all()
        assert same_bits(await store.load(hit, device=decoder), kv[:, :, :WHOLE])


async def test_a_cancelled_load_ends_when_what_was_queued_has(
    tmp_path: Path, decoder: DeviceDecoder, engine: Engine
) -> None:
    kv, late, loop, queued = draw_kv(), engine.late, asyncio.get_running_loop(), asyncio.Event()

    def note(*_: object) -> None:
        loop.call_soon_threadsafe(queued.set)

    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        hit = await store.lookup(TOKENS)
        late.may_run.clear()
        load = asyncio.create_task(load_in_place(store, hit, engine, decoder, note))
        await asyncio.wait_for(queued.wait(), 60)
        load.cancel()
        await asyncio.wait({load}, timeout=0.1)
        assert not load.done()
        late.may_run.set()
        await asyncio.gather(load, return_exceptions=True)
        engine.fill(2)
        late.finish()
    assert (engine.caches == 2).all()


class FailingLibrary(CountingLibrary):
    """Fails once, at a call that it is told of."""

    fails_at = 0

    def lossless_decode(self, jobs: int, count: int, pages: Pages, faults: int, stream: int) -> None:
        self.fails_at -= 1
        if self.fails_at == 0:
            raise DeviceError("kvs_lossless_decode failed with CUDA error 700")
        super().lossless_decode(jobs, count, pages, faults, stream)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize("what", ["launching", "what comes behind it"])
async def test_a_device_that_fails_half_way_writes_nothing_any_more(
    tmp_path: Path,
    library: CountingLibrary,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    fails_at: int,
    what: str,
) -> None:
    kv, failing = draw_kv(), FailingLibrary(library.path, emulated=True)
    left, fetch = fails_at if what != "launching" else 0, Slot.fetch_control

    def fetch_control(slot: Slot, part: slice) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError("CUDA out of memory")
        fetch(slot, part)

    monkeypatch.setattr(Slot, "fetch_control", fetch_control)
    with DeviceDecoder(failing, HOST, DECODER_BUDGET) as decoder:
        async with opened(tmp_path) as store:
            await store.save(TOKENS, kv)
            hit = await store.lookup(TOKENS)
            failing.fails_at = fails_at if what == "launching" else 0
            with suppress(DeviceError):  # it may all be in fewer batches
                await load_in_place(store, hit, engine, decoder)
            engine.fill(2)
            engine.late.finish()
            assert (engine.caches == 2).all()
            failing.fails_at = left = 0
            assert same_bits(await store.load(hit, device=decoder), kv[:, :, :WHOLE])


@pytest.mark.parametrize(("span", "kept"), [("head", 0.6), ("all", 0)])
async def test_calibrations_that_do_not_fit_are_there_when_they_are_needed(
    tmp_path: Path,
    library: CountingLibrary,
    late: LateDevice,
    calibrations: dict[str, list[Calibration]],
    monkeypatch: pytest.MonkeyPatch,
    span: str,
    kept: float,
) -> None:
    """Loads and saves of two calibrations in turn, with room for so much of one; and no more memory than that."""
    both, kv = calibrations[span], draw_kv(seed=9)
    size = sum(unit.synthesis.nbytes + 2 * unit.synthesis_scale.nbytes for unit in both[0].units.values())
    budget = 4 * ENCODER_BUDGET
    monkeypatch.setattr("kvstore_s3.codec.device.decoder.CALIBRATION_BUDGETS", kept * size / DECODER_BUDGET)
    monkeypatch.setattr("kvstore_s3.codec.device.encoder.CALIBRATION_BUDGETS", kept * size / budget)
    async with opened(tmp_path / "host", profile="near-lossless") as store:
        expected = []
        for number in range(2):
            await store.calibrations.publish(both[number].to_bytes())
            await store.save([number, *TOKENS[1:]], kv)
            expected.append(await store.load(await store.lookup([number, *TOKENS[1:]])))
    async with opened(tmp_path / "device", profile="near-lossless") as store:
        with (
            DeviceDecoder(library, HOST, DECODER_BUDGET) as decoder,
            DeviceEncoder(library, HOST, budget) as encoder,
        ):
            hits = []
            for number in range(4):
                await store.calibrations.publish(both[number % 2].to_bytes())
                await store.save([number, *TOKENS[1:]], DeviceKV.of(late.on_device(kv), encoder))
                hits.append(await store.lookup([number, *TOKENS[1:]]))
            for _ in range(2):
                found = await asyncio.gather(*(store.load(hit, device=decoder) for hit in hits))
                assert all(close(one, expected[number % 2], span) for number, one in enumerate(found))
                del found
    tables = 4 * 2 * 260_000  # each artefact that is published is a calibration of its own
    fetched = ENCODER_SLOTS * 5 * kv[0, :, :CHUNK].nbytes  # what has no room is coded by the CPU
    assert late.most_allocated <= DECODER_BUDGET + budget + 2 * kept * size + tables + fetched
    assert late.most_allocated >= DECODER_BUDGET // 3


async def test_what_a_device_cannot_encode_is_fetched_from_it(
    tmp_path: Path, encoder: DeviceEncoder, engine: Engine, library: CountingLibrary
) -> None:
    kv = draw_kv()
    library.broken = True
    async with opened(tmp_path) as store:
        engine.write(kv)
        on_device = engine.kv(encoder)
        await store.take(on_device)
        engine.fill(2)
        await store.save(TOKENS[:WHOLE], on_device)
        assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :WHOLE])
