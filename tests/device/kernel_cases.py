"""Work for every kernel, small, whose bytes depend on nothing but what goes in: not on who comes first.

Grids are kept so small that warps and blocks take several pieces of work, one after the other: what one leaves in
shared memory is where the next begins.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from codec.calibrations import make_calibration
from codec.sections import draw_normal, draw_outliers, draw_random
from codec.test_lossless_document import GOLDEN, golden_values, lossless_names
from device import scalable_encoder as encoding
from device import test_lossless_decode as lossless
from device import test_lossless_encode as lossless_encoding
from device import test_scalable_decode as scalable
from device.emulated import Device
from device.scalable_batch import Batch, Given
from device.test_scalable_encode import huge, loud_tokens, outliers_behind_outliers, tokens_that_are_not_finite
from golden_files import LOSSY

from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.codec.lossless import LosslessCodec
from kvstore_s3.encode import view_bits
from kvstore_s3.layout import KVLayout


@dataclass(frozen=True, slots=True)
class KernelCase:
    """`run` gives what the kernels wrote."""

    name: str
    run: Callable[[Device], bytes]
    multiprocessors: int = field(default=0)
    """The most that are used; 0: all that the emulation has."""

    def __call__(self, device: Device) -> bytes:
        with limited(device, self.multiprocessors):
            return self.run(device)


@contextmanager
def limited(device: Device, most: int) -> Iterator[None]:
    device.library.call("kvs_limit_multiprocessors", ctypes.c_uint32(most))
    try:
        yield
    finally:
        device.library.call("kvs_limit_multiprocessors", ctypes.c_uint32(0))


def _lossless_decoding() -> Iterator[KernelCase]:
    paged = lossless.Arrangement(axes="blkntd", block_tokens=16, token_begin=21, layer_begin=1, head=1, skew=2)
    for name in lossless_names():
        yield KernelCase(
            f"lossless decode, golden {name}", lambda device, name=name: _decode_golden(device, name, paged)
        )
    yield KernelCase("lossless decode, many heads of all kinds", _decode_many_heads, 1)
    shape = lossless.BLOCK.shape
    yield KernelCase(
        "lossless decode, damaged",
        lambda device: _joined(
            *lossless.decode(device, lossless.HEADER_FAULTS, _of_heads(shape, lossless.HEADER_FAULTS))
        ),
    )


def _decode_golden(device: Device, name: str, where: lossless.Arrangement) -> bytes:
    values = golden_values(name)
    streams = lossless.cut((GOLDEN / f"{name}.payload").read_bytes(), values.shape[3])
    return _joined(*lossless.decode(device, streams, values.shape, where))


def _decode_many_heads(device: Device) -> bytes:
    rng = np.random.default_rng(1)
    values = draw_outliers(rng, (1, 2, 9, 70, 24))
    values[:, :, :, ::7] = draw_random(rng, (1, 2, 9, 10, 24))  # stored raw
    streams = lossless.cut(LosslessCodec().encode(values), 70)
    for head in range(0, 70, 10):
        streams[head] = streams[head][:-4]
    faults, found = lossless.decode(device, streams, values.shape, lossless.Arrangement(block_tokens=4))
    return _joined(faults, found[:, :, :, np.array(faults) == 0])


def _of_heads(shape: Sequence[int], streams: Sequence[bytes]) -> tuple[int, ...]:
    return (*shape[:3], len(streams), shape[4])


def _joined(faults: Sequence[int], values: Bits) -> bytes:
    return repr(list(faults)).encode() + values.tobytes()


def _lossless_encoding() -> Iterator[KernelCase]:
    for name, what in json.loads((GOLDEN / "index.json").read_text()).items():
        if what["codec"] == 1:
            yield KernelCase(
                f"lossless encode, golden {name}",
                lambda device, name=name: lossless_encoding.encode_all(device, golden_values(name)),
            )
    yield KernelCase("lossless encode, many heads and sections", _encode_many_heads, 1)


def _encode_many_heads(device: Device) -> bytes:
    rng = np.random.default_rng(2)
    values = draw_normal(rng, (2, 2, 35, 40, 24))
    values[0, 0, 3, ::3] = 0x7F80  # escapes
    every = slice(None)
    wanted = [
        lossless_encoding.Section(every, every, slice(0, 19), every),
        lossless_encoding.Section(slice(1, 2), slice(1, 2), slice(19, 35), slice(2, 5)),
    ]
    paging = lossless_encoding.Paging(16, align=2)
    return b"".join(lossless_encoding.encode(device, values, wanted, paging))


def _scalable_decoding() -> Iterator[KernelCase]:
    for mode, calibration in scalable.MODES.items():
        floats = calibration if calibration is None else _with_floats(calibration)
        yield KernelCase(
            f"scalable decode, chunks, {mode}", lambda device, of=calibration: _decode_chunks(device, of, range(3)), 1
        )
        if floats is not calibration:
            yield KernelCase(
                f"scalable decode, chunks, {mode} of floats",
                lambda device, of=floats: _decode_chunks(device, of, range(3)),
            )
    yield KernelCase("scalable decode, many chunks", lambda device: _decode_chunks(device, None, range(40)), 1)
    for span, dim, tokens in (("group", 128, 140), ("group", 130, 66), ("head", 40, 33), ("uncalibrated", 256, 21)):
        yield KernelCase(
            f"scalable decode, dim {dim}, {span}", lambda device, of=(span, dim, tokens): _decode_wide(device, *of), 1
        )
    for name in LOSSY:
        yield KernelCase(
            f"scalable decode, golden {name}", lambda device, name=name: _decode_golden_object(device, name)
        )


def _with_floats(calibration: Calibration) -> Calibration:
    """The same with matrices of float32; itself where it has none."""
    units = {
        place: dataclasses.replace(unit, synthesis=unit.synthesis.astype(np.float32))
        for place, unit in calibration.units.items()
        if unit.synthesis is not None
    }
    return dataclasses.replace(calibration, units=units) if units else calibration


def _decode_chunks(device: Device, calibration: Calibration | None, seeds: range) -> bytes:
    """Of several lengths and levels, some with exact tokens, raw streams or damage."""
    sections, at = [], 0
    for seed in seeds:
        kv = scalable.values_of(seed, 9 + 7 * (seed % 3))
        if seed % 4 == 1:
            kv[0, 0, 2, 0, 0], kv[:, :, :, 1, 3] = float("nan"), float("inf") if seed % 8 == 1 else 1.0
        case = encoding.Case(view_bits(kv), scalable.ROTATION, calibration=calibration)
        payloads = case.on_host()[: 3 - seed % 5 // 3]
        if seed % 6 == 5:
            payloads[-1] = payloads[-1][:20] + bytes(len(payloads[-1]) - 20)
        sections.append(scalable.whole(payloads, tokens=kv.shape[2], token_begin=at, object_levels=3))
        at += kv.shape[2]
    batch = Batch(device, scalable.DIM, "bfloat16", calibration)
    return _sound_values(batch, sections, at)


def _sound_values(batch: Batch, sections: Sequence[Given], tokens: int) -> bytes:
    decoded = batch.decode(sections, (scalable.LAYERS, tokens, scalable.HEADS, 0))
    ends = [(given.token_begin, given.token_begin + given.tokens) for given in sections]
    sound = [
        decoded.values[:, :, begin:end] for (begin, end), fault in zip(ends, decoded.faults, strict=True) if not fault
    ]
    return _joined(decoded.faults, np.concatenate(sound, axis=2))


def _decode_wide(device: Device, span: str, dim: int, tokens: int) -> bytes:
    calibration, _, payloads = _wide(span, dim, tokens)
    decoded = Batch(device, dim, "bfloat16", calibration).decode(
        [Given(payloads, (0, 1), 1, tokens)], (1, tokens, 1, 0)
    )
    return _joined(decoded.faults, decoded.values)


@cache
def _wide(span: str, dim: int, tokens: int) -> tuple[Calibration | None, torch.Tensor, list[bytes]]:
    """A calibration of one head of `dim` (or none), values, and what the CPU makes of them."""
    layout = KVLayout(1, 1, dim, "bfloat16", rope={"rope_type": "default", "rope_theta": 10000})

    def sample(seed: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed)
        return (torch.randn(1, 2, 150, 1, dim, generator=rng) * torch.logspace(0.5, -1.5, dim)).to(torch.bfloat16)

    calibration = None if span == "uncalibrated" else make_calibration(layout, span, sample)
    kv = sample(5)[:, :, :tokens].contiguous()
    kv[0, 1, 3, 0, 1] = float("nan")
    return calibration, kv, scalable.encode(kv, calibration, rotation=encoding.Rotation.from_layout(layout))


def _decode_golden_object(device: Device, name: str) -> bytes:
    sections, identity, calibration = scalable.golden_sections(name, 3)
    layout, shard = identity.layout, identity.shard
    batch = Batch(device, layout.head_dim, layout.dtype, calibration)
    decoded = batch.decode(sections, (shard.layers, identity.tokens, shard.heads, shard.layer_begin))
    return _joined(decoded.faults, decoded.values)


def _scalable_encoding() -> Iterator[KernelCase]:
    modes: dict[str, Calibration | None] = {"uncalibrated": None, **encoding.CALIBRATIONS}
    for mode, calibration in modes.items():
        yield KernelCase(f"scalable encode, {mode}", lambda device, of=calibration: _encode(device, of, torch.bfloat16))
        if calibration is not None and _with_floats(calibration) is not calibration:
            yield KernelCase(
                f"scalable encode, {mode} of floats",
                lambda device, of=calibration: _encode(device, _analysis_of_floats(of), torch.float16),
            )
    for change in (tokens_that_are_not_finite, outliers_behind_outliers, loud_tokens, huge):
        for mode in ("uncalibrated", "channel"):
            yield KernelCase(
                f"scalable encode, {change.__name__}, {mode}",
                lambda device, of=(change, mode): _encode_changed(device, *of),
            )
    yield KernelCase("scalable encode, many streams", _encode_many_streams, 1)
    yield KernelCase("scalable encode, dim 128, group", lambda device: _encode_wide(device, "group", 128, 140), 1)
    yield KernelCase("scalable encode, dim 130, group", lambda device: _encode_wide(device, "group", 130, 70), 1)


def _analysis_of_floats(calibration: Calibration) -> Calibration:
    units = {
        place: dataclasses.replace(unit, analysis=unit.analysis.astype(np.float32))
        for place, unit in calibration.units.items()
        if unit.analysis is not None
    }
    return dataclasses.replace(calibration, units=units)


def _encode(device: Device, calibration: Calibration | None, dtype: torch.dtype) -> bytes:
    kv = encoding.values_of(7, 37, dtype)
    kv[0, 1, 5, 1, 2] = float("nan")
    case = encoding.case_of_layout(kv, calibration, first_position=0)
    return b"".join(encoding.Coder(device).encode(case, encoding.Paging(5)))


def _encode_changed(device: Device, change: Callable[[torch.Tensor], None], mode: str) -> bytes:
    kv = encoding.values_of(10, 60)
    change(kv)
    case = encoding.case_of_layout(kv, encoding.CALIBRATIONS.get(mode))
    return b"".join(encoding.Coder(device).encode(case))


def _encode_many_streams(device: Device) -> bytes:
    kv = torch.cat([encoding.values_of(seed, 11) * 3.0**seed for seed in range(18)], dim=3)
    kv[:, :, 3:5, ::3] *= 50
    kv[:, :, 4, 5] = float("nan")
    kv[:, :, :, 11] = float("nan")
    case = encoding.case_of(kv, encoding.ROTATION)
    return b"".join(encoding.Coder(device).encode(case))


def _encode_wide(device: Device, span: str, dim: int, tokens: int) -> bytes:
    calibration, kv, _ = _wide(span, dim, tokens)
    rotation = encoding.Rotation.none(1) if calibration is None else calibration.rotation
    case = encoding.case_of(kv, rotation, calibration)
    return b"".join(encoding.Coder(device).encode(case))


KINDS = {
    "lossless decode": _lossless_decoding,
    "lossless encode": _lossless_encoding,
    "scalable decode": _scalable_decoding,
    "scalable encode": _scalable_encoding,
}


def cases_of(kind: str) -> list[KernelCase]:
    return list(KINDS[kind]())
