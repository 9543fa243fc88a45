"""From verified payloads to what the kernels are told: which bytes to copy, and one job for each head. Pure.

Sizes come from the layout; the payload's own table of lengths is checked as the CPU decoder does it
(csrc/cpu/lossless_decode.cpp). What lies inside a stream is for the kernel to check.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_s3.codec.device.library import LOSSLESS_JOB
from kvstore_s3.errors import BitstreamFault, DamagedObjectError

Jobs = npt.NDArray[np.void]
"""`LOSSLESS_JOB` items, whose `stream` counts from the first byte that is copied and whose `layer_begin` from the
target's first layer."""

MAX_JOBS = 4096
"""Most jobs of one piece, unless it is one section."""

_MAX_GAP = 4096
"""Bytes between two sections' streams that are copied along: the padding of one, and the other's table of lengths."""


@dataclass(frozen=True, slots=True)
class LosslessSection:
    """One verified section of codec 1, of which `heads` from `head_begin` on are wanted.

    `layer_begin`, `kind_begin` (0: K, 1: V) and `token_begin` say where its values begin in the target, whose head 0
    is the first that is wanted.
    """

    payload: memoryview
    section_heads: int
    head_begin: int
    heads: int
    tokens: int
    layers: int
    layer_begin: int
    kinds: int = 2
    kind_begin: int = 0
    token_begin: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that are copied to the device in one go, and the jobs that read them there."""

    address: int
    """Of the first byte, in this process's memory."""
    length: int
    jobs: Jobs

    @property
    def end(self) -> int:
        return self.address + self.length


@dataclass(frozen=True, slots=True)
class Form:
    """How pages lie, but for the addresses of their planes. Strides in elements; see `KvsPages` in api.h."""

    dim: int
    token_stride: int
    head_stride: int
    block_table: int = 0
    block_tokens: int = 0
    block_stride: int = 0


@dataclass(frozen=True, slots=True)
class Target:
    """Where values go in the device's memory: addresses of each layer's K and V, [layers, 2], and their form."""

    planes: npt.NDArray[np.uint64]
    form: Form


def find_target(address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> Target:
    """The target that is a tensor [layers, 2, tokens, heads, dim] at `address`, strides in elements, dim contiguous."""
    layers, kinds, _, _, dim = shape
    assert strides[4] == 1
    first = np.arange(layers, dtype=np.int64)[:, None] * strides[0] + np.arange(kinds, dtype=np.int64) * strides[1]
    return Target((address + first * itemsize).astype(np.uint64), Form(dim, strides[2], strides[3]))


def plan_pieces(sections: Iterable[LosslessSection], most: int) -> list[Piece]:
    """What to copy for `sections` of one buffer, and their jobs; neighbours go together, up to `most` bytes.

    Raises `DamagedObjectError` where a payload's table of lengths is not one.
    """
    pieces: list[Piece] = []
    for piece in sorted(map(plan_section, sections), key=lambda piece: piece.address):
        joined = _join(pieces[-1], piece, most) if pieces else None
        if joined is None:
            pieces.append(piece)
        else:
            pieces[-1] = joined
    return pieces


def plan_section(section: LosslessSection) -> Piece:
    """The streams of the wanted heads. Raises `DamagedObjectError`."""
    begins, ends = _find_streams(section.payload, section.section_heads)
    wanted = slice(section.head_begin, section.head_begin + section.heads)
    first, last = int(begins[section.head_begin]), int(ends[wanted][-1])
    jobs = np.zeros(section.heads, LOSSLESS_JOB)
    jobs["stream"] = begins[wanted] - first
    jobs["length"] = ends[wanted] - begins[wanted]
    jobs["tokens"] = section.tokens
    jobs["token_begin"] = section.token_begin
    jobs["layer_begin"] = section.layer_begin
    jobs["layers"] = section.layers
    jobs["kind_begin"] = section.kind_begin
    jobs["kinds"] = section.kinds
    jobs["head"] = np.arange(section.heads)
    return Piece(_address_of(section.payload) + first, last - first, jobs)


def _find_streams(payload: memoryview, heads: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where each head's stream begins and ends."""
    table = 4 * heads
    if len(payload) < table:
        raise _refuse(BitstreamFault.TRUNCATED, f"its table of {heads} lengths alone has {table}", payload)
    lengths = np.frombuffer(payload[:table], "<u4").astype(np.int64)
    ends = table + np.cumsum(lengths)
    total = int(ends[-1])
    if total != len(payload):
        code = BitstreamFault.TRUNCATED if total > len(payload) else BitstreamFault.BAD_PAYLOAD
        raise _refuse(code, f"its table of lengths calls for {total}", payload)
    if (lengths % 2).any():  # no encoder makes one, and streams behind it would not be aligned
        raise _refuse(BitstreamFault.BAD_PAYLOAD, "a head's stream has an odd length", payload)
    return ends - lengths, ends


def _refuse(code: BitstreamFault, why: str, payload: memoryview) -> DamagedObjectError:
    return DamagedObjectError(code, f"a lossless payload of {len(payload)} bytes: {why}; save the chunk again")


def _join(one: Piece, other: Piece, most: int) -> Piece | None:
    """Both as one; None where they are too far apart, too large together, or not aligned to each other."""
    offset = other.address - one.address
    if not one.length <= offset <= one.length + _MAX_GAP or offset % 4:
        return None
    if offset + other.length > most or len(one.jobs) + len(other.jobs) > MAX_JOBS:
        return None
    moved = other.jobs.copy()
    moved["stream"] += np.uint64(offset)
    return Piece(one.address, offset + other.length, np.concatenate([one.jobs, moved]))


def _address_of(view: memoryview) -> int:
    where: dict[str, Any] = np.frombuffer(view, np.uint8).__array_interface__
    return int(where["data"][0])
