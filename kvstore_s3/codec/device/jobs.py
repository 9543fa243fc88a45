"""From verified payloads of codec 1 to what the kernels are told: which bytes to copy, and one job for each head. Pure.

Sizes come from the layout; the payload's own table of lengths is checked as the CPU decoder does it
(csrc/cpu/lossless_decode.cpp). What lies inside a stream is for the kernel to check.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvstore_s3.codec.device.library import LOSSLESS_JOB, Library, Pages
from kvstore_s3.codec.device.pieces import Jobs, Piece, Places, Run, Scratch, address_of, place_in
from kvstore_s3.errors import BitstreamFault, DamagedObjectError

MAX_JOBS = 4096
"""Most jobs of one piece, unless it is one section."""

_MAX_GAP = 4096
"""Bytes between two sections' streams that are copied along: the padding of one, and the other's table of lengths."""


@dataclass(frozen=True, slots=True)
class LosslessWork:
    """Jobs are `LOSSLESS_JOB`."""

    def addresses(self, jobs: Jobs) -> npt.NDArray[np.uint64]:
        found: npt.NDArray[np.uint64] = jobs["stream"]
        return found

    def move_scratch(self, jobs: Jobs, by: Scratch) -> None:
        """They need none."""

    def launch(
        self, library: Library, pieces: Sequence[Piece], pages: Pages, places: Places, faults: int, stream: int
    ) -> None:
        count = sum(len(piece.jobs) for piece in pieces)
        library.lossless_decode(places.jobs, count, pages, faults, stream)


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


def plan_pieces(sections: Iterable[LosslessSection], most: int) -> list[Piece]:
    """What to copy for `sections` of one buffer, and their jobs; neighbours go together, up to `most` bytes.

    Raises `DamagedObjectError` where a payload's table of lengths is not one.
    """
    pieces: list[Piece] = []
    for piece in sorted(map(plan_section, sections), key=lambda piece: piece.runs[0].address):
        joined = _join(pieces[-1], piece, most) if pieces else None
        if joined is None:
            pieces.append(piece)
        else:
            pieces[-1] = joined
    return pieces


def plan_section(section: LosslessSection) -> Piece:
    """The streams of the wanted heads, one run. Raises `DamagedObjectError`."""
    begins, ends = _find_streams(section.payload, section.section_heads)
    wanted = slice(section.head_begin, section.head_begin + section.heads)
    first, last = int(begins[section.head_begin]), int(ends[wanted][-1])
    jobs = np.zeros(section.heads, LOSSLESS_JOB)
    jobs["stream"] = (begins[wanted] - first).astype(np.uint64) + np.uint64(place_in(0))
    jobs["length"] = ends[wanted] - begins[wanted]
    jobs["tokens"] = section.tokens
    jobs["token_begin"] = section.token_begin
    jobs["layer_begin"] = section.layer_begin
    jobs["layers"] = section.layers
    jobs["kind_begin"] = section.kind_begin
    jobs["kinds"] = section.kinds
    jobs["head"] = np.arange(section.heads)
    return Piece((Run(address_of(section.payload) + first, last - first),), jobs, LosslessWork())


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
    (first,), (second,) = one.runs, other.runs
    offset = second.address - first.address
    if not first.length <= offset <= first.length + _MAX_GAP or offset % 4:
        return None
    if offset + second.length > most or len(one.jobs) + len(other.jobs) > MAX_JOBS:
        return None
    moved = other.jobs.copy()
    moved["stream"] += np.uint64(offset)
    return replace(one, runs=(Run(first.address, offset + second.length),), jobs=np.concatenate([one.jobs, moved]))
