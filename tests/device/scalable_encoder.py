"""Sections of codec 3 to encode: as the host encodes them, and as a device does, from pages with canaries around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from codec.calibrations import make_calibration
from device.emulated import Buffer, Device

from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.calibration import SPANS, Calibration
from kvstore_s3.codec.device.library import Pages
from kvstore_s3.codec.device.scalable_encode import ScalableEncodeCalls
from kvstore_s3.codec.device.scalable_encode_jobs import ScalableEncodePlan, ScalableEncodePlanner, SectionInPages
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.codec.scalable import _base_header, _encode_stream, _maps_of
from kvstore_s3.codec.stream_map import StreamMap
from kvstore_s3.encode import view_bits
from kvstore_s3.layout import KVLayout

LAYERS, HEADS, DIM, TOKENS = 2, 2, 12, 20
ROPE = {"rope_type": "default", "rope_theta": 10000}
LAYOUT = KVLayout(LAYERS, HEADS, DIM, "bfloat16", rope=ROPE)
ROTATION = Rotation.from_layout(LAYOUT)
CANARY = 0xA5


def values_of(seed: int = 0, tokens: int = TOKENS, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """KV of a chunk [2, 2, tokens, 2, 12]: correlated, of many scales, with a mean."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(99)) * torch.logspace(-1.5, 0.5, DIM)
    kv = torch.randn(LAYERS, 2, tokens, HEADS, DIM, generator=rng) @ mixing.T + torch.linspace(-3, 3, DIM)
    return kv.to(dtype)


def calibrate(span: str, **options: Any) -> Calibration:
    return make_calibration(LAYOUT, span, lambda seed: values_of(seed, 96), **options)


CALIBRATIONS = {span: calibrate(span) for span in SPANS}
COARSE = calibrate("channel", relative_step=2.0)
"""Most components round to zero: those with outliers show."""


@dataclass(frozen=True, slots=True)
class Case:
    """A section as its engine has it: `values` are bit patterns [layers, 2, tokens, heads, dim]."""

    values: Bits
    rotation: Rotation
    dtype: str = "bfloat16"
    calibration: Calibration | None = None
    first_position: int = 256
    levels: int = 3

    @property
    def maps(self) -> list[StreamMap]:
        return _maps_of(self.values, 0, 0, self.calibration, self.rotation)

    def on_host(self) -> list[bytes]:
        """What the host's encoder makes of each level; sections are never coded exactly here."""
        streams = [_encode_stream(self.values, self.dtype, one, self.first_position, self.levels) for one in self.maps]
        heads = [_base_header(self.first_position, self.calibration, self.maps[0], self.levels), b"", b""]
        return [
            heads[level]
            + np.array([len(stream[level]) for stream in streams], "<u4").tobytes()
            + b"".join(stream[level] for stream in streams)
            for level in range(self.levels)
        ]


def case_of(kv: torch.Tensor, rotation: Rotation, calibration: Calibration | None = None, **options: Any) -> Case:
    return Case(view_bits(kv), rotation, str(kv.dtype)[6:], calibration, **options)


def case_of_layout(kv: torch.Tensor, calibration: Calibration | None = None, **options: Any) -> Case:
    return case_of(kv, ROTATION, calibration, **options)


class Put:
    """An array on the device, as a planner wants it."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer

    def data_ptr(self) -> int:
        return self._buffer.address


@dataclass(frozen=True, slots=True)
class Paging:
    """Blocks of tokens in no order, or one after the other; [head][token] within a block, as FlashInfer has it."""

    block_tokens: int = 0
    head_major: bool = False
    skew: int = 0


class EnginePages:
    """Values [layers, 2, tokens, heads, dim] in pages on the device."""

    def __init__(self, device: Device, values: Bits, paging: Paging) -> None:
        layers, kinds, tokens, heads, dim = values.shape
        size = paging.block_tokens or tokens
        blocks = -(-tokens // size)
        table = (np.random.default_rng(3).permutation(blocks + 2) if paging.block_tokens else np.arange(1))[:blocks]
        memory = np.full((layers, kinds, blocks + 2, size, heads, dim), 0x4242, values.dtype)
        for token in range(tokens):
            memory[:, :, table[token // size], token % size] = values[:, :, token]
        strides = [stride // values.itemsize for stride in memory.strides]
        if paging.head_major:
            memory = np.ascontiguousarray(memory.swapaxes(3, 4))
            strides[3], strides[4] = dim, size * dim
        begins = np.add.outer(np.arange(layers) * strides[0], np.arange(kinds) * strides[1]) * values.itemsize
        pool = device.put(memory, skew=paging.skew)
        self._held = [pool, device.put((begins + pool.address).astype(np.uint64)), device.put(table.astype(np.uint32))]
        self.pages = Pages(
            planes=self._held[1].address,
            block_table=self._held[2].address if paging.block_tokens else 0,
            block_tokens=paging.block_tokens,
            dim=dim,
            block_stride=strides[2],
            token_stride=strides[3],
            head_stride=strides[4],
        )


class Coder:
    """Encodes cases on a device."""

    def __init__(self, device: Device) -> None:
        self.device, self._kept = device, list[Put]()
        self.calls = ScalableEncodeCalls(device.library)
        self.planner = ScalableEncodePlanner(self.calls, self._put)

    def _put(self, values: Any) -> Put:
        self._kept.append(Put(self.device.put(np.ascontiguousarray(values))))
        return self._kept[-1]

    def plan(self, case: Case, **options: Any) -> ScalableEncodePlan | None:
        layers, _, tokens, heads, dim = case.values.shape
        place: dict[str, Any] = {"layers": (0, layers), "first_head": 0, "heads": heads, "head_dim": dim}
        place |= {"tokens": tokens, "token_begin": 0, "layer_begin": 0, "head": 0} | options
        known = (case.first_position, case.dtype, case.levels, case.calibration, case.rotation)
        names = ("first_position", "dtype", "levels", "calibration", "rotation")
        return self.planner.plan(SectionInPages(**place, **dict(zip(names, known, strict=True))))

    def encode(self, case: Case, paging: Paging = Paging(8)) -> list[bytes]:
        plan = self.plan(case)
        assert plan is not None
        return self.run([plan], EnginePages(self.device, case.values, paging))[0]

    def run(self, plans: Sequence[ScalableEncodePlan], pool: EnginePages) -> list[list[bytes]]:
        """The levels of each section, by one call; what lies behind a payload is untouched."""
        payloads = [self.device.put(bytes([CANARY]) * plan.payload_bytes) for plan in plans]
        scratch = [self.device.put(bytes([CANARY]) * plan.scratch_bytes) for plan in plans]
        places = zip(plans, payloads, scratch, strict=True)
        jobs = np.concatenate([self._place(plan, one.address, two.address) for plan, one, two in places])
        lengths = self.device.put(np.full((len(jobs), 3), 77, np.uint32))
        queue = self.device.put(jobs)
        stream = self.device.stream
        plans[0].work.launch(jobs, pool.pages, at=queue.address, lengths=lengths.address, stream=stream)
        found, rows = [], np.frombuffer(lengths.read(), np.uint32).reshape(-1, 3)
        for plan, payload in zip(plans, payloads, strict=True):
            own, rows = rows[: len(plan.jobs)], rows[len(plan.jobs) :]
            found.append(cut_levels(payload.read(), plan, own))
        return found

    def _place(self, plan: ScalableEncodePlan, payload: int, scratch: int) -> np.ndarray:
        header, *angles = (self._put(table).data_ptr() for table in (plan.header, *plan.angles))
        return plan.place(payload, scratch, header, angles)


def cut_levels(payload: bytes, plan: ScalableEncodePlan, lengths: np.ndarray) -> list[bytes]:
    sizes = (lengths.sum(axis=0) + 4 * len(lengths)).astype(int)
    sizes[0] += int(plan.jobs["header_bytes"][0])
    ends = np.cumsum(sizes[: plan.section.levels])
    assert not lengths[:, plan.section.levels :].any()
    assert set(payload[ends[-1] :]) <= {CANARY}
    asked = plan.level_sizes(lengths)
    assert asked == (sizes[: plan.section.levels].tolist() if ends[-1] <= plan.section.nbytes // 2 else None)
    return [payload[end - size : end] for size, end in zip(sizes, ends, strict=False)]
