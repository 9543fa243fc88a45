"""From sections in an engine's pages to what the kernels that encode codec 1 are told: one job for each head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore_s3.codec.device.encode_plans import EncodeJobs, Lengths
from kvstore_s3.codec.device.library import LOSSLESS_ENCODE_JOB, Library, Pages
from kvstore_s3.codec.device.pieces import round_up
from kvstore_s3.codec.lossless import MAX_HEAD_BYTES


@dataclass(frozen=True, slots=True)
class LosslessEncodeWork:
    """Jobs are `LOSSLESS_ENCODE_JOB`."""

    library: Library
    lengths: int = 1

    def launch(self, jobs: EncodeJobs, pages: Pages, *, at: int, lengths: int, stream: int) -> None:
        self.library.lossless_encode(at, len(jobs), pages, lengths, stream)


@dataclass(frozen=True, slots=True, eq=False)
class LosslessEncodePlan:
    """The jobs of one section."""

    work: LosslessEncodeWork
    jobs: EncodeJobs
    payload_bytes: int
    scratch_bytes: int
    raw_bytes: int
    """Of its values."""

    @property
    def header(self) -> npt.NDArray[np.uint8]:
        return np.zeros(0, np.uint8)

    @property
    def angles(self) -> Sequence[npt.NDArray[np.float32]]:
        return ()

    def place(self, payload: int, scratch: int, header: int, angles: Sequence[int]) -> EncodeJobs:
        jobs = self.jobs.copy()
        jobs["payload"] = payload
        jobs["scratch"] += np.uint64(scratch)
        return jobs

    def level_sizes(self, lengths: Lengths) -> Sequence[int] | None:
        """None: raw is no longer."""
        size = 4 * len(lengths) + int(lengths.astype(np.int64).sum())
        return [size] if size < self.raw_bytes else None


def plan_lossless(
    library: Library, shape: tuple[int, ...], dtype: str, *, layers: tuple[int, int], tokens: tuple[int, int]
) -> LosslessEncodePlan | None:
    """A range of layers and of tokens, first and behind the last, of memory [layers, 2, tokens, heads, dim].

    None: nothing for the device.
    """
    if dtype != "bfloat16" or not library.has("kvs_lossless_encode"):
        return None
    heads, dim = shape[3:]
    count = tokens[1] - tokens[0]
    components = 2 * (layers[1] - layers[0]) * dim
    if 2 * components * count >= MAX_HEAD_BYTES:
        return None
    scratch = round_up(library.lossless_encode_scratch(components, count))
    jobs = np.zeros(heads, LOSSLESS_ENCODE_JOB)
    jobs["scratch"] = np.arange(heads, dtype=np.uint64) * np.uint64(scratch)
    jobs["token_begin"], jobs["tokens"] = tokens[0], count
    jobs["layer_begin"], jobs["layers"] = layers[0], layers[1] - layers[0]
    jobs["kinds"], jobs["heads"] = 2, heads
    jobs["head"] = jobs["index"] = np.arange(heads)
    raw = heads * 2 * components * count
    return LosslessEncodePlan(LosslessEncodeWork(library), jobs, raw + 8 * heads, heads * scratch, raw)
