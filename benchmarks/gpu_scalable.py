"""Decoding lossy sections on a GPU: with a calibration of span group (a KLT of 4 layers, K and V), and without one.

The calibration is made up: a drawn orthonormal basis of all components of a head in a layer group, deviations that
fall by 2^-10 from the first to the last, as those of real KV do, and K rotated by its positions.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from gpu_cases import Model, PagedCache, pick
from gpu_compare import PRODUCTS, SUMS, Expected, check_faults
from gpu_decoding import stage

from kvstore_s3 import KVLayout
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.calibration import SPANS, Calibration, Unit
from kvstore_s3.codec.device.library import Library
from kvstore_s3.codec.device.scalable_calls import ScalableCalls, ScalableSection, ScalableUnit
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.codec.scalable import decode_scalable, encode_scalable
from kvstore_s3.codec.tables import classes_of, fit_tables, uncalibrated_tables

T = TypeVar("T")

BFLOAT16 = 1
LEVELS = 3
CACHE = 2**26
"""Bytes: more than a GPU's cache holds. As many of streams are there, that each section's are read from memory."""
FIRST_POSITION = 4096
LARGEST, SMALLEST = 2.0**7, 2.0**-3
"""Deviations of the first and the last component, in the finest steps: some 4 bits a value with all levels."""


@dataclass(frozen=True, slots=True)
class LossySections:
    """Different sections of layers 0 to `group`: values, and payloads level by level."""

    model: Model
    rotation: Rotation
    calibration: Calibration | None
    values: Sequence[Bits]
    payloads: Sequence[Sequence[bytes]]
    _known: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    """What the CPU has coded and decoded of them: once."""

    @property
    def bits_per_value(self) -> list[float]:
        """With one, two and three levels."""
        values = len(self.payloads) * int(np.prod(self.model.section_shape))
        sizes = np.cumsum([[len(level) for level in section] for section in self.payloads], axis=1)
        return [float(bits) for bits in 8 * sizes.sum(axis=0) / values]

    def encode_on_host(self, which: int, levels: int) -> Sequence[bytes]:
        """Payloads of an object of so many levels."""
        if levels == LEVELS:
            return self.payloads[which]
        return self.once(
            ("coded", which, levels),
            lambda: encode_on_host(self.values[which], self.calibration, self.rotation, levels),
        )

    def expect(self, levels: int) -> Expected:
        """What all sections decode to from their first levels."""

        def decode() -> Expected:
            with ThreadPoolExecutor() as threads:
                values = threads.map(lambda payloads: decode_bits(self, payloads[:levels]), self.payloads)
                return Expected(list(values), SUMS if self.calibration is None else PRODUCTS)

        return self.once(("expected", levels), decode)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` made, now or before."""
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found


def encode_on_host(
    values: Bits, calibration: Calibration | None, rotation: Rotation, levels: int = LEVELS
) -> list[bytes]:
    coded = encode_scalable(
        values,
        "bfloat16",
        layer_begin=0,
        first_position=FIRST_POSITION,
        calibration=calibration,
        rotation=rotation,
        levels=levels,
    )
    assert all(codec == 3 for codec, _ in coded), "these values should be coded with loss"
    return [payload for _, payload in coded]


def decode_on_host(sections: LossySections, payloads: Sequence[bytes]) -> np.ndarray:
    """Values, as floats, from their first levels."""
    return (decode_bits(sections, payloads).astype(np.uint32) << 16).view(np.float32)


def decode_bits(sections: LossySections, payloads: Sequence[bytes]) -> Bits:
    """The same, as they are stored."""
    out = np.empty(sections.model.section_shape, np.uint16)
    decode_scalable(
        [(3, memoryview(payload)) for payload in payloads],
        out,
        "bfloat16",
        layer_begin=0,
        head_begin=0,
        section_heads=sections.model.heads,
        first_position=FIRST_POSITION,
        calibration=sections.calibration,
    )
    return out


def draw_lossy(model: Model, count: int, *, calibrated: bool) -> LossySections:
    layout = KVLayout(model.group, model.heads, model.dim, "bfloat16", rope={"rope_type": "default", "rope_theta": 5e5})
    rotation = Rotation.from_layout(layout)
    rng = np.random.Generator(np.random.PCG64(5))
    components = 2 * model.group * model.dim
    basis = draw_basis(components, rng)
    deviations = np.geomspace(LARGEST, SMALLEST, components).astype(np.float32)
    calibration = make_up(model, rotation, basis, deviations, rng) if calibrated else None
    drawn = []
    for _ in range(count):
        y = rng.standard_normal((model.heads, model.tokens, components), np.float32) * deviations
        x = (y @ basis).reshape(model.heads, model.tokens, model.group, 2, model.dim).transpose(2, 3, 1, 0, 4)
        drawn.append((rotate(x, rotation).view(np.uint32) >> 16).astype(np.uint16))
    with ThreadPoolExecutor() as threads:
        payloads = list(threads.map(lambda values: encode_on_host(values, calibration, rotation), drawn))
    return LossySections(model, rotation, calibration, drawn, payloads)


def draw_basis(size: int, rng: np.random.Generator) -> np.ndarray:
    """Orthonormal rows: a cosine transform of numbers whose signs and order are drawn."""
    angles = np.outer(np.arange(size), np.arange(size) + 0.5) * (np.pi / size)
    rows = np.cos(angles) * np.sqrt(2 / size)
    rows[0] /= np.sqrt(2)
    return (rows * rng.choice([-1.0, 1.0], size))[:, rng.permutation(size)].astype(np.float32)


def make_up(
    model: Model, rotation: Rotation, basis: np.ndarray, deviations: np.ndarray, rng: np.random.Generator
) -> Calibration:
    """All heads have the same basis; tables are those of normal numbers."""
    sample = (rng.standard_normal((512, len(deviations)), np.float32) * deviations).astype(np.float32)
    classes = classes_of(sample)
    tables = fit_tables([np.rint(sample).astype(np.int16)], [classes])
    unit = Unit.pack(classes, basis, basis)
    units = {(0, head): unit for head in range(model.heads)}
    mean = np.zeros((model.group, 2, model.heads, model.dim), np.float32)
    return Calibration(
        bytes(32), model.group, model.heads, model.dim, "group", model.group, rotation, mean, tables, units
    )


def rotate(x: np.ndarray, rotation: Rotation) -> np.ndarray:
    """K [layers, 0, tokens, heads, dim] turned by its position, halves of a head against each other."""
    cosines, sines = (table[:, None] for table in rotation.tables(FIRST_POSITION, x.shape[2]))
    out = np.ascontiguousarray(x, dtype=np.float32)
    half = cosines.shape[2]
    a, b = x[:, 0, :, :, :half], x[:, 0, :, :, half:]
    out[:, 0, :, :, :half] = a * cosines - b * sines
    out[:, 0, :, :, half:] = b * cosines + a * sines
    return out


class LossyDecoding:
    """All heads of `chunks` chunks from their first `levels` levels, decoded into a paged cache.

    Each layer group has its own copy of the calibration on the device, as a model's groups have.
    """

    def __init__(
        self,
        library: Library,
        sections: LossySections,
        levels: int,
        chunks: int,
        cache: PagedCache,
        device: torch.device,
    ) -> None:
        self._sections, self._levels, self._chunks, self._cache = sections, levels, chunks, cache
        self._device, self._model = device, sections.model
        self._calls = ScalableCalls(library)
        self._kept: list[Any] = []
        tables = uncalibrated_tables() if sections.calibration is None else sections.calibration.tables
        self._first, self._tables = tables.first, self._put(self._calls.pack_tables(tables))
        self._units = [self._put_units() for _ in range(self._model.groups)]
        self._hosts = [[np.frombuffer(level, np.uint8) for level in section] for section in sections.payloads]
        flat = [level for section in sections.payloads for level in section]
        copies = min(chunks, -(-CACHE // sum(map(len, flat))))
        staged, addresses = stage(flat * copies, device)
        self._kept.append(staged)
        self._addresses = np.array(addresses).reshape(copies, len(sections.payloads), -1)
        rotation = sections.rotation
        cosines, sines = rotation.tables(FIRST_POSITION, self._model.tokens)
        self._angles = self._put(cosines), self._put(sines), cosines.shape[1]
        self._rotated = self._put(np.ascontiguousarray(rotation.select(0, self._model.group)))
        self._style = rotation.style_id
        described = [self._describe(chunk, group) for group in range(self._model.groups) for chunk in range(chunks)]
        begin = time.perf_counter()
        parsed = self._calls.parse(described)
        self.host_seconds = time.perf_counter() - begin
        assert not parsed.faults.any(), f"verdicts {sorted(set(parsed.faults.tolist()))} of sections that are good"
        self._totals = parsed.totals
        self._jobs = self._put(parsed.jobs)
        self._numbers = torch.empty(parsed.totals.numbers, dtype=torch.int16, device=device)
        self._order = torch.empty(max(parsed.totals.order, 1), dtype=torch.int32, device=device)
        self.faults = torch.full((parsed.totals.jobs,), -1, dtype=torch.int32, device=device)

    @staticmethod
    def bytes_needed(model: Model, chunks: int) -> int:
        """Device memory: the cache, and two bytes a value between the kernels."""
        return 2 * chunks * model.chunk_bytes + 2**28

    @property
    def bits_per_value(self) -> float:
        return self._sections.bits_per_value[self._levels - 1]

    def run(self, stream: int) -> None:
        self._calls.decode(
            self._jobs,
            self._totals,
            self._cache.pages,
            dtype_id=BFLOAT16,
            numbers=self._numbers.data_ptr(),
            order=self._order.data_ptr(),
            faults=self.faults.data_ptr(),
            stream=stream,
        )

    def spoil(self) -> None:
        """Forget what was decoded."""
        self._cache.spoil()
        self.faults.fill_(-1)
        self._numbers.fill_(-1)

    def check(self) -> None:
        """Every stream decoded, and every section is near the CPU's. Raises `AssertionError`."""
        check_faults(self.faults, "streams")
        self._sections.expect(self._levels).check(self._cache, self._model, self._chunks)

    def _put(self, data: np.ndarray) -> int:
        tensor = torch.from_numpy(np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8).copy())
        self._kept.append(tensor.to(self._device))
        return int(self._kept[-1].data_ptr())

    def _put_units(self) -> Any:
        calibration = self._sections.calibration
        if calibration is None:
            return None
        units = (ScalableUnit * self._model.heads)()
        for head in range(self._model.heads):
            unit = calibration.units[0, head]
            assert unit.synthesis is not None
            self._kept.append(unit.classes)
            units[head] = ScalableUnit(
                host_classes=unit.classes.ctypes.data,
                classes=self._put(unit.classes),
                mean=self._put(calibration.unit_mean(0, head)),
                scale=self._put(unit.synthesis_scale),
                matrix=self._put(unit.synthesis),
                components=len(unit.classes),
                matrix_bytes=unit.synthesis.itemsize,
                largest_scale=float(np.abs(unit.synthesis_scale).max()),
            )
        return units

    def _describe(self, chunk: int, group: int) -> ScalableSection:
        model = self._model
        which = pick(model, len(self._hosts), chunk, group)
        section = ScalableSection(
            units=0,
            tables=self._tables,
            cosines=self._angles[0],
            sines=self._angles[1],
            first_position=FIRST_POSITION,
            levels=self._levels,
            object_levels=LEVELS,
            tokens=model.tokens,
            heads=model.heads,
            dim=model.dim,
            head_begin=0,
            head_end=model.heads,
            token_begin=chunk * model.tokens,
            layer_begin=group * model.group,
            head=0,
            layers=model.group,
            pairs=self._angles[2],
            item_bytes=2,
        )
        section.first[:] = self._first
        for level in range(self._levels):
            section.payload[level] = self._hosts[which][level].ctypes.data
            section.device[level] = int(self._addresses[chunk % len(self._addresses), which, level])
            section.lengths[level] = len(self._hosts[which][level])
        if self._sections.calibration is not None:
            section.units = ctypes.addressof(self._units[group])
            section.span, section.style = SPANS.index("group"), self._style
            section.rotated = self._rotated
        return section
