"""The golden objects of profile 2 and their calibrations, as code. `golden/regenerate.py` writes them.

They are made from integers by the slow encoder of `crafted_scalable.py`, so they are the same on every machine; the
values that go with them are what the reference decoder makes of them, and another decoder may be off in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import reference_decoder as reference
from blake3 import blake3
from crafted import Crafted, CraftedSection
from crafted_scalable import (
    CraftedHead,
    CraftedStream,
    RawStream,
    draw,
    draw_floats,
    draw_integers,
    encode_integers,
    make_calibration,
    make_tables,
    pack_payloads,
    style_id,
    unit_classes,
)
from golden_objects import SPECIAL, Golden, encode_exact, make_identity, make_values
from reference_calibration import SPANS, Calibration, read_calibration, uncalibrated_tables
from reference_scalable import decode_integers

from kvstore_s3.bitstream import Identity
from kvstore_s3.codec.base import Bits
from kvstore_s3.layout import Shard

SCALABLE_TOO = frozenset({reference.LOSSLESS, reference.SCALABLE})


@dataclass(frozen=True)
class Plan:
    """How one section is made. `exact`: tokens whose values are given; the rest goes by stream number."""

    layers: tuple[int, int]
    exact: Sequence[int] = ()
    raw: Sequence[int] = ()
    explicit: Sequence[int] = ()
    extreme: Mapping[int, Sequence[tuple[int, int, int]]] = field(default_factory=dict)
    """(token, component, q2) to be coded instead of what was drawn."""
    codec: str = "scalable"
    highest: int = 29
    """The largest class that is drawn in uncalibrated mode."""


@dataclass(frozen=True)
class Rotary:
    style: str = "none"
    frequencies: Sequence[float] = ()
    rotated: Sequence[int] = ()


class Maker:
    """Makes the sections of one object."""

    def __init__(self, name: str, identity: Identity, *, levels: int = 3, first_position: int = 0) -> None:
        self.name, self.identity, self.levels, self.first_position = name, identity, levels, first_position
        self.artefact: bytes | None = None
        self.calibration: Calibration | None = None
        self.rotary = Rotary()

    def calibrate(self, span: str, layer_group: int, rotary: Rotary, components: int | None = None) -> None:
        layout = self.identity.layout
        self.artefact = make_calibration(
            self.name,
            namespace=self.identity.namespace,
            span=span,
            layers=layout.layers,
            kv_heads=layout.kv_heads,
            dim=layout.head_dim,
            layer_group=layer_group,
            components=components,
            rotary=rotary.style,
            frequencies=rotary.frequencies,
            rotated=rotary.rotated or None,
            tables=make_tables(),
        )
        self.calibration = read_calibration(self.artefact)

    def make(self, plans: Sequence[Plan]) -> Golden:
        coded = [self.payloads(plan) for plan in plans]
        sections = [
            CraftedSection(level=level, codec=levels[level][0], layers=plan.layers, data=levels[level][1])
            for level in range(self.levels)
            for plan, levels in zip(plans, coded, strict=True)
        ]
        digest = bytes(32) if self.artefact is None else blake3(self.artefact).digest()
        data = Crafted(self.identity, sections, {"profile": 2, "calibration": digest}).object()
        return Golden(
            self.name,
            self.identity,
            data,
            None,
            profile="scalable",
            codecs=tuple(sorted({plan.codec for plan in plans})),
            levels=self.levels,
            first_position=self.first_position,
            artefact=self.artefact,
        )

    def payloads(self, plan: Plan) -> list[tuple[int, bytes]]:
        """(codec id, payload) by level."""
        if plan.codec != "scalable":
            base = encode_exact(self.values(plan), self.identity, plan.codec)
            return [base] + [(4, b"\0")] * (self.levels - 1)
        return [(3, payload) for payload in pack_payloads(self.head(plan), self.streams(plan))]

    @property
    def span(self) -> str:
        return "channel" if self.calibration is None else SPANS[self.calibration.span]

    def head(self, plan: Plan) -> CraftedHead:
        if self.calibration is not None:
            return CraftedHead(0, self.calibration.span, self.levels, 0, self.first_position)
        rotated = self.rotary.rotated[plan.layers[0] : plan.layers[1]]
        style = style_id(self.rotary.style)
        return CraftedHead(1, 0, self.levels, style, self.first_position, self.rotary.frequencies, rotated)

    def streams(self, plan: Plan) -> list[CraftedStream | RawStream]:
        count = 1 if self.span == "all" else self.identity.shard.heads
        return [self.stream(plan, self.span, head) for head in range(count)]

    def stream(self, plan: Plan, span: str, head: int) -> CraftedStream | RawStream:
        rows = self.patterns(plan, span, head)
        item, seed = self.identity.layout.itemsize, f"{self.name} {plan.layers} {head}"
        if head in plan.raw:
            return RawStream(rows, item)
        steps: list[float] = []
        means: list[int] = []
        if self.calibration is None:
            classes = [abs(value) % (plan.highest + 1) for value in draw(f"{seed} classes", len(rows[0]))]
            steps = (abs(draw_floats(f"{seed} steps", (2 * (plan.layers[1] - plan.layers[0]),), 0.01)) + 0.001).tolist()
            means = [value % 256 - 128 for value in draw(f"{seed} means", len(rows[0]))]
            tables, given = uncalibrated_tables(), True
        else:
            u = 0 if span == "all" else self.identity.shard.head_begin + head
            classes = unit_classes(self.calibration, plan.layers[0], u)
            tables, given = self.calibration.tables, head in plan.explicit
            if given:
                classes = [min(47, of + 3) if at % 3 else 0 for at, of in enumerate(classes)]
        q2 = draw_integers(f"{seed} numbers", classes, self.identity.tokens)
        for token, component, value in plan.extreme.get(head, ()):
            q2[token][component] = value
        for token in plan.exact:
            q2[token] = [0] * len(classes)
        coded = encode_integers(q2, classes, tables, self.levels)
        exact = {token: rows[token] for token in plan.exact}
        return CraftedStream(coded, classes if given else None, steps, means, exact, item)

    def values(self, plan: Plan) -> Bits:
        whole = make_values(self.identity, self.name)
        begin = self.identity.shard.layer_begin
        return whole[plan.layers[0] - begin : plan.layers[1] - begin]

    def patterns(self, plan: Plan, span: str, head: int) -> list[list[int]]:
        """Bit patterns of each token in x's order; every fifth number of the exact tokens is a special one."""
        values = self.values(plan)
        part = values if span == "all" else values[:, :, :, head : head + 1]
        rows = part.transpose(2, 3, 0, 1, 4).reshape(self.identity.tokens, -1).tolist()
        special = SPECIAL[self.identity.layout.dtype]
        for token in plan.exact:
            rows[token][::5] = [special[at % len(special)] for at in range(len(rows[token][::5]))]
        return rows


def _identity(name: str, shard: Shard, dtype: str, tokens: int, dim: int, layers: int, kv_heads: int) -> Identity:
    return make_identity(name, shard, dtype=dtype, tokens=tokens, head_dim=dim, layers=layers, kv_heads=kv_heads)


def _example() -> Golden:
    """The worked example: one layer, one head, sixteen tokens of two values, without a calibration."""
    maker = Maker(
        "scalable-example", _identity("scalable-example", Shard(0, 1, 0, 1), "bfloat16", 16, 2, 1, 1), first_position=16
    )
    maker.rotary = Rotary("halves", [0.5], [1])
    return maker.make([Plan((0, 1), exact=[3], extreme={0: [(1, 0, 9 * 9)]}, highest=20)])


def _group() -> Golden:
    """Span group over two layers and one, fewer components than numbers, partial rotation of some layers."""
    maker = Maker("scalable-group", _identity("scalable-group", Shard(0, 3, 0, 2), "bfloat16", 12, 6, 3, 2))
    maker.calibrate("group", 2, Rotary("halves", [1.0, 0.125], [1, 0, 1]), 19)
    return maker.make([Plan((0, 2), exact=[0]), Plan((2, 3), exact=[0, 7], explicit=[1])])


def _channel() -> Golden:
    """Span channel in float16, rotation in pairs, classes of its own for one stream, a raw stream, escapes."""
    identity = _identity("scalable-channel", Shard(0, 2, 0, 3), "float16", 16, 8, 2, 3)
    maker = Maker("scalable-channel", identity, first_position=4096)
    maker.calibrate("channel", 2, Rotary("pairs", [1.0, 0.1, 0.01], [1, 1]))
    extreme = {0: [(5, 2, 32404), (5, 3, -32404), (6, 2, 9 * 128), (9, 1, -9 * 200)]}
    return maker.make([Plan((0, 2), raw=[1], explicit=[2], extreme=extreme)])


def _head() -> Golden:
    """Span head in float32, no rotation, some heads of a model; one section is exact at level 0 alone."""
    maker = Maker("scalable-head", _identity("scalable-head", Shard(1, 4, 1, 3), "float32", 12, 4, 4, 4))
    maker.calibrate("head", 1, Rotary())
    return maker.make([Plan((1, 2), exact=[4]), Plan((2, 3), codec="planes"), Plan((3, 4))])


def _all() -> Golden:
    """Span all: one stream of several blocks; exact tokens hold NaN and infinities."""
    identity = _identity("scalable-all", Shard(0, 2, 0, 2), "bfloat16", 12, 8, 2, 2)
    maker = Maker("scalable-all", identity, first_position=2**20)
    maker.calibrate("all", 2, Rotary("halves", [1.0, 0.25, 0.0625, 0.015625], [1, 1]), 50)
    return maker.make([Plan((0, 2), exact=[0, 3, 11])])


def _uncalibrated() -> Golden:
    """No calibration: scale classes, steps and means in the streams; a lossless section beside them, and a raw one."""
    identity = _identity("scalable-uncalibrated", Shard(0, 4, 1, 3), "bfloat16", 48, 6, 4, 4)
    maker = Maker("scalable-uncalibrated", identity, first_position=96)
    maker.rotary = Rotary("halves", [1.0, 0.1], [1, 1, 0, 1])
    extreme = {0: [(5, 2, 32404), (5, 3, -32404)]}
    plans = [Plan((0, 2), exact=[0, 9], extreme=extreme), Plan((2, 3), codec="lossless"), Plan((3, 4), raw=[1])]
    return maker.make(plans)


def _of_dtype(name: str, dtype: str, rotary: Rotary) -> Callable[[], Golden]:
    def make() -> Golden:
        maker = Maker(name, _identity(name, Shard(0, 1, 0, 2), dtype, 24, 8, 1, 2), first_position=24)
        maker.rotary = rotary
        return maker.make([Plan((0, 1), exact=[2], highest=40)])

    return make


def _of_levels(levels: int) -> Callable[[], Golden]:
    def make() -> Golden:
        name = f"scalable-levels-{levels}"
        maker = Maker(name, _identity(name, Shard(0, 2, 0, 1), "bfloat16", 24, 20, 2, 1), levels=levels)
        return maker.make([Plan((0, 1)), Plan((1, 2), codec="raw")])

    return make


SCALABLE_MAKERS: Sequence[Callable[[], Golden]] = (
    _example,
    _group,
    _channel,
    _head,
    _all,
    _uncalibrated,
    _of_dtype("scalable-fp16", "float16", Rotary("pairs", [1.0, 0.5, 0.25, 0.125], [1])),
    _of_dtype("scalable-fp32", "float32", Rotary()),
    _of_levels(1),
    _of_levels(2),
)


def make_all_scalable() -> list[Golden]:
    return [make() for make in SCALABLE_MAKERS]


# What is in them, by the reference decoder


def calibrations_of(artefact: bytes | None) -> dict[bytes, Calibration]:
    return {} if artefact is None else {blake3(artefact).digest(): read_calibration(artefact)}


def decode_levels(data: bytes, expected: reference.Expected, artefact: bytes | None, levels: int) -> Bits:
    """The values that the first `levels` levels hold, flat in the canonical order."""
    values = reference.decode(data, expected, SCALABLE_TOO, calibrations_of(artefact), levels)
    return np.array(values, np.uint32 if expected.dtype == 3 else np.uint16)


def digest_integers(data: bytes, expected: reference.Expected, artefact: bytes | None, levels: int) -> str:
    """BLAKE3 of q after `levels` levels: i16 by section, stream, token and component."""
    calibrations = calibrations_of(artefact)
    hasher = blake3()
    for group in reference.group_levels(reference.read_header(data, expected, SCALABLE_TOO, calibrations)):
        base = group[0][1]
        if base.codec == 3:
            payloads = [reference.read_payload(data, number, part, expected) for number, part in group[:levels]]
            section = reference.scalable_section(base, len(group), expected)
            calibration = calibrations.get(reference.read_calibration_digest(data))
            _, _, streams = decode_integers(payloads, section, calibration)
            hasher.update(b"".join(np.array(q, "<i2").tobytes() for q in streams))
    return hasher.hexdigest()
