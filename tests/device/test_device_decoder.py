"""The queue in front of the kernels: batches, budgets, faults, cancellation, ends."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
import torch
from codec.sections import draw_normal, draw_random
from device.emulated import ON_DEVICE, Device

from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.device.batch import CONTROL_BYTES
from kvstore_s3.codec.device.decoder import SLOTS, SMALLEST_BUDGET, DeviceDecoder
from kvstore_s3.codec.device.jobs import LosslessSection, LosslessWork, plan_pieces
from kvstore_s3.codec.device.library import LOSSLESS_JOB, Library
from kvstore_s3.codec.device.pieces import Form, Piece, Run, Target, find_target
from kvstore_s3.codec.device.requests import Copy, Request, Room, Waiting
from kvstore_s3.codec.lossless import LosslessCodec
from kvstore_s3.errors import (
    BitstreamFault,
    DamagedObjectError,
    DeviceError,
    InvalidArgumentError,
    StoreUnavailableError,
)

RNG = np.random.Generator(np.random.PCG64(9))
SHAPE = (2, 2, 6, 2, 8)
MEMORY = torch.device("cuda" if ON_DEVICE else "cpu")


@pytest.fixture
def decoder(device: Device) -> Iterator[DeviceDecoder]:
    with DeviceDecoder(device.library, MEMORY, SMALLEST_BUDGET) as decoder:
        yield decoder


def plan(payloads: list[bytes], shape: tuple[int, ...] = SHAPE) -> list[Piece]:
    """One section after the other, each behind the last one's layers."""
    layers, kinds, tokens, heads, _ = shape
    return [
        piece
        for number, payload in enumerate(payloads)
        for piece in plan_pieces(
            [LosslessSection(memoryview(payload), heads, 0, heads, tokens, layers, layers * number, kinds)], 1 << 20
        )
    ]


def target_of(values: torch.Tensor) -> Target:
    return find_target(values.data_ptr(), values.shape, values.stride(), values.element_size())


def room_for(sections: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.zeros((shape[0] * sections, *shape[1:]), dtype=torch.bfloat16, device=MEMORY)


def bits_of(values: torch.Tensor) -> Bits:
    found: Bits = values.cpu().view(torch.uint16).numpy()
    return found


def encode(values: Bits) -> bytes:
    return LosslessCodec().encode(values)


def test_sections_come_out_bit_for_bit(decoder: DeviceDecoder) -> None:
    values = [draw_normal(RNG, SHAPE), draw_random(RNG, SHAPE)]
    payloads, out = [encode(one) for one in values], room_for(2)
    decoder.decode(target_of(out), plan(payloads), after=decoder.mark_current()).result()
    assert np.array_equal(bits_of(out), np.concatenate(values))


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_device_that_cannot_be_used_fails_loads_and_not_those_to_come(
    decoder: DeviceDecoder, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    values = draw_normal(RNG, SHAPE)
    payload, out = encode(values), room_for(1)

    def refuse(_: torch.device) -> None:
        raise error("no context")

    monkeypatch.setattr("kvstore_s3.codec.device.decoder.use_device", refuse)
    for _ in range(2 * SLOTS):
        with pytest.raises(DeviceError, match="no context"):
            decoder.decode(target_of(out), plan([payload]), after=decoder.mark_current()).result(60)
    monkeypatch.setattr("kvstore_s3.codec.device.decoder.use_device", lambda _: None)
    decoder.decode(target_of(out), plan([payload]), after=decoder.mark_current()).result(60)
    assert np.array_equal(bits_of(out), values)


def test_targets_of_several_forms_are_decoded_at_once(decoder: DeviceDecoder) -> None:
    shapes = [(1, 2, 5, 2, 8), (2, 2, 5, 1, 8), (1, 2, 3, 2, 24)]
    values = [draw_normal(RNG, shape) for shape in shapes for _ in range(3)]
    payloads = [encode(one) for one in values]
    outs = [torch.zeros(one.shape, dtype=torch.bfloat16, device=MEMORY) for one in values]
    futures = [
        decoder.decode(target_of(out), plan([payload], tuple(out.shape)), after=decoder.mark_current())
        for out, payload in zip(outs, payloads, strict=True)
    ]
    for future, out, one in zip(futures, outs, values, strict=True):
        future.result()
        assert np.array_equal(bits_of(out), one)


def test_pages_are_found_by_their_block_table(decoder: DeviceDecoder) -> None:
    block_tokens, blocks = 4, [5, 0, 3, 1]
    tokens = len(blocks) * block_tokens
    pages = torch.zeros((2, 2, 7, block_tokens, 2, 8), dtype=torch.bfloat16, device=MEMORY)
    whole = find_target(pages.data_ptr(), (2, 2, 1, 1, 8), (*pages.stride()[:2], 0, 0, 1), 2)
    block, token, head = pages.stride()[2:5]
    target = Target(whole.planes, Form(8, token, head, block_tokens, block), np.array(blocks, np.uint32))
    values = draw_normal(RNG, (2, 2, tokens, 2, 8))
    halves = [encode(np.ascontiguousarray(values[:, :, part])) for part in (slice(0, 6), slice(6, tokens))]
    sections = [
        LosslessSection(memoryview(halves[0]), 2, 0, 2, 6, 2, 0),
        LosslessSection(memoryview(halves[1]), 2, 0, 2, tokens - 6, 2, 0, token_begin=6),
    ]
    pieces = [piece for section in sections for piece in plan_pieces([section], 1 << 20)]
    decoder.decode(target, pieces, after=decoder.mark_current()).result()
    found = bits_of(pages[:, :, blocks].flatten(2, 3))
    assert np.array_equal(found, values)
    assert not bits_of(pages[:, :, [2, 4, 6]]).any()


def test_what_the_cpu_decoded_is_copied_where_it_belongs(decoder: DeviceDecoder) -> None:
    out = room_for(2)
    values = decoder.staging((1, 1, *SHAPE[2:]), torch.bfloat16).fill_(3)
    payload = encode(draw_normal(RNG, SHAPE))
    decoder.decode(target_of(out), plan([payload]), [Copy(values, out[2:3, 1:])]).result()
    assert bool((out[2:3, 1:] == 3).all())
    assert bool((out[3] == 0).all())
    decoder.decode(target_of(out), [], [Copy(values, out[3:, 1:])]).result()
    assert bool((out[3:, 1:] == 3).all())


def test_more_than_the_budget_goes_in_several_batches(device: Device) -> None:
    shape = (1, 2, 3200, 1, 64)  # raw, for speed: 0.8 MB each, in slots of 1 MiB
    values = [draw_random(RNG, shape) for _ in range(7)]
    payloads, out = [encode(one) for one in values], room_for(7, shape)
    with DeviceDecoder(device.library, MEMORY, SMALLEST_BUDGET) as decoder:
        pieces = plan(payloads, shape)
        assert sum(piece.data_bytes for piece in pieces) > SLOTS * decoder.largest > SLOTS * pieces[0].data_bytes
        decoder.decode(target_of(out), pieces, after=decoder.mark_current()).result()
    assert np.array_equal(bits_of(out), np.concatenate(values))


def test_a_damaged_stream_fails_its_request_and_no_other(decoder: DeviceDecoder) -> None:
    values = [draw_normal(RNG, SHAPE) for _ in range(3)]
    payloads, outs = [encode(one) for one in values], [room_for(1) for _ in values]
    damaged = bytearray(payloads[1])
    damaged[8] = 7  # the mode of its first stream
    futures = [
        decoder.decode(target_of(out), plan([payload]))
        for out, payload in zip(outs, [payloads[0], bytes(damaged), payloads[2]], strict=True)
    ]
    with pytest.raises(DamagedObjectError) as caught:
        futures[1].result()
    assert caught.value.code == BitstreamFault.BAD_PAYLOAD
    for number in (0, 2):
        futures[number].result()
        assert np.array_equal(bits_of(outs[number]), values[number])


def test_a_kernel_that_cannot_be_launched_is_an_error_of_the_device_and_not_of_the_data(tmp_path: Path) -> None:
    with DeviceDecoder(build_library(tmp_path, "return 2;"), MEMORY, SMALLEST_BUDGET) as decoder:
        assert decoder.takes(1, "bfloat16", 100)
        for _ in range(SLOTS + 1):  # slots come back
            payload = encode(draw_normal(RNG, SHAPE))
            with pytest.raises(DeviceError, match="kvs_lossless_decode failed with CUDA error 2"):
                decoder.decode(target_of(room_for(1)), plan([payload])).result()


def test_a_kernel_that_never_ran_is_not_taken_for_a_good_one(tmp_path: Path) -> None:
    with DeviceDecoder(build_library(tmp_path, "return 0;"), MEMORY, SMALLEST_BUDGET) as decoder:
        payload = encode(draw_normal(RNG, SHAPE))
        with pytest.raises(DeviceError, match="has not come to a stream"):
            decoder.decode(target_of(room_for(1)), plan([payload])).result()


def test_an_older_library_leaves_the_decoding_to_the_cpu(tmp_path: Path) -> None:
    with DeviceDecoder(build_library(tmp_path, "return 0;", name="other"), MEMORY, SMALLEST_BUDGET) as decoder:
        assert not decoder.takes(1, "bfloat16", 100)


def test_only_what_kernels_can_do_is_taken(decoder: DeviceDecoder) -> None:
    assert decoder.takes(1, "bfloat16", decoder.largest)
    assert not decoder.takes(1, "bfloat16", decoder.largest + 1)
    assert not decoder.takes(2, "bfloat16", 100)
    assert not decoder.takes(1, "float16", 100)


def test_a_closed_decoder_takes_nothing_more(device: Device) -> None:
    decoder = DeviceDecoder(device.library, MEMORY, SMALLEST_BUDGET)
    out, payload = room_for(1), encode(draw_normal(RNG, SHAPE))
    decoder.decode(target_of(out), plan([payload])).result()
    decoder.close()
    decoder.close()
    with pytest.raises(StoreUnavailableError):
        decoder.decode(target_of(out), plan([payload]))


def test_a_budget_that_holds_nothing_is_refused(device: Device) -> None:
    with pytest.raises(InvalidArgumentError, match="too few"):
        DeviceDecoder(device.library, MEMORY, SMALLEST_BUDGET - 1)


def test_a_request_cancelled_before_its_turn_never_begins() -> None:
    waiting, requests = Waiting(), [make_request() for _ in range(3)]
    for request in requests:
        waiting.add(request)
    assert requests[1].future.cancel()
    taken = waiting.take(Room(1 << 20, CONTROL_BYTES))
    assert {id(part.request) for part in taken} == {id(requests[0]), id(requests[2])}
    assert not requests[0].future.cancel()
    with pytest.raises(CancelledError):
        requests[1].future.result()


def test_a_request_ends_when_its_last_part_has_ended_though_it_failed_before() -> None:
    waiting, request = Waiting(), make_request(pieces=3)
    waiting.add(request)
    piece = request.parts[0]
    assert piece is not None
    taken = waiting.take(Room(2 * piece.data_bytes, CONTROL_BYTES))
    assert len(taken) == 2
    request.end_part(DeviceError("failed"))
    assert not request.future.done()
    waiting.add(other := make_request())
    (part,) = waiting.take(Room(1 << 20, CONTROL_BYTES))  # the third part does not begin
    assert part.request is other
    assert not request.future.done()
    request.end_part()
    with pytest.raises(DeviceError, match="failed"):
        request.future.result(0)


def test_closing_fails_what_waits() -> None:
    waiting, request = Waiting(), make_request()
    waiting.add(request)
    waiting.close()
    with pytest.raises(StoreUnavailableError):
        request.future.result(0)
    assert waiting.take(Room(1 << 20, CONTROL_BYTES)) == []


def test_bytes_that_several_pieces_read_take_room_once() -> None:
    one = make_request().parts[0]
    assert one is not None
    waiting = Waiting()
    waiting.add(Request(target_of(torch.zeros(SHAPE, dtype=torch.bfloat16)), [one] * 3, (), None))
    assert len(waiting.take(Room(one.data_bytes, CONTROL_BYTES))) == 3


def make_request(pieces: int = 1) -> Request:
    made = [Piece((Run(160 * number, 160),), np.zeros(2, LOSSLESS_JOB), LosslessWork()) for number in range(pieces)]
    return Request(target_of(torch.zeros(SHAPE, dtype=torch.bfloat16)), made, (), None)


def build_library(folder: Path, body: str, *, name: str = "kvs_lossless_decode") -> Library:
    """A library whose only function does just this."""
    source, built = folder / "library.cpp", folder / "library.so"
    source.write_text(f'extern "C" int {name}(void*, unsigned, void*, void*, void*) {{ {body} }}')
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
    return Library(built, emulated=True)
