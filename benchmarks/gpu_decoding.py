"""Decoding lossless sections on a GPU: all heads of some chunks, by one launch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from gpu_cases import Model, PagedCache, Sections
from gpu_compare import Expected, check_faults

from kvstore_s3.codec.device.library import LOSSLESS_JOB, Library


class LosslessDecoding:
    """All heads of `chunks` chunks, decoded into a paged cache."""

    def __init__(
        self, library: Library, sections: Sections, chunks: int, cache: PagedCache, device: torch.device
    ) -> None:
        self._library, self._sections, self._cache, self.chunks = library, sections, cache, chunks
        model = sections.model
        self._expected = Expected(sections.values)
        self._staged, begins = stage(sections.payloads, device)
        jobs = np.zeros((model.groups, chunks, model.heads), LOSSLESS_JOB)
        jobs["tokens"], jobs["layers"], jobs["kinds"] = model.tokens, model.group, 2
        jobs["token_begin"] = (np.arange(chunks) * model.tokens)[None, :, None]
        jobs["layer_begin"] = (np.arange(model.groups) * model.group)[:, None, None]
        jobs["head"] = np.arange(model.heads)
        for group in range(model.groups):
            for chunk in range(chunks):
                place_streams(jobs[group, chunk], sections.payloads[sections.pick(chunk, group)])
                jobs["stream"][group, chunk] += np.uint64(begins[sections.pick(chunk, group)])
        self._jobs = torch.from_numpy(jobs.reshape(-1).view(np.uint8)).to(device)
        self._count = jobs.size
        self.faults = torch.full((jobs.size,), -1, dtype=torch.int32, device=device)

    @staticmethod
    def bytes_needed(model: Model, chunks: int) -> int:
        """Device memory: the cache, streams and jobs."""
        return chunks * model.chunk_bytes + 2**28

    @property
    def bits_per_value(self) -> float:
        return self._sections.bits_per_value

    def run(self, stream: int) -> None:
        jobs, faults = self._jobs.data_ptr(), self.faults.data_ptr()
        self._library.lossless_decode(jobs, self._count, self._cache.pages, faults, stream)

    def spoil(self) -> None:
        """Forget what was decoded."""
        self._cache.spoil()
        self.faults.fill_(-1)

    def check(self) -> None:
        """Every head decoded, and every section came out as it went in. Raises `AssertionError`."""
        check_faults(self.faults, "heads")
        self._expected.check(self._cache, self._sections.model, self.chunks)


def place_streams(jobs: np.ndarray, payload: bytes) -> None:
    """Fill in where the streams of a payload lie in it, and how long they are: one job for each head."""
    heads = jobs.shape[0]
    lengths = np.frombuffer(payload[: 4 * heads], "<u4").astype(np.int64)
    jobs["length"] = lengths
    jobs["stream"] = 4 * heads + np.cumsum(lengths) - lengths


def stage(payloads: Sequence[bytes], device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """All payloads on the device, and the address of each, a multiple of 16."""
    offsets = np.cumsum([0, *((len(payload) + 15) // 16 * 16 for payload in payloads)])
    host = np.zeros(int(offsets[-1]), np.uint8)
    for payload, offset in zip(payloads, offsets, strict=False):
        host[offset : offset + len(payload)] = np.frombuffer(payload, np.uint8)
    staged = torch.from_numpy(host).to(device)
    return staged, [staged.data_ptr() + int(offset) for offset in offsets[:-1]]
