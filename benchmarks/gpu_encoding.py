"""Encoding from an engine's blocks on a GPU: all heads of some chunks, by the lossless codec."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from gpu_cases import PagedCache, Sections

from kvstore_s3.codec.device.library import LOSSLESS_ENCODE_JOB, Library


def scratch_bytes(library: Library, components: int, tokens: int) -> int:
    """What one head needs, rounded up so that the next is aligned."""
    ask = ctypes.CDLL(str(library.path)).kvs_lossless_encode_scratch
    ask.restype = ctypes.c_uint64
    return (int(ask(ctypes.c_uint64(components), ctypes.c_uint64(tokens))) + 15) // 16 * 16


class LosslessEncoding:
    """All heads of `chunks` chunks, out of a paged cache that holds the sections' values."""

    def __init__(
        self, library: Library, sections: Sections, chunks: int, cache: PagedCache, device: torch.device
    ) -> None:
        self._sections, self._cache, self.chunks = sections, cache, chunks
        model = sections.model
        _fill(cache, sections, chunks, device)
        self._room = (model.heads * 8 + sections.values[0].nbytes + 15) // 16 * 16
        self._payloads = torch.empty(model.groups * chunks * self._room, dtype=torch.uint8, device=device)
        scratch = scratch_bytes(library, model.group * 2 * model.dim, model.tokens)
        jobs = np.zeros((model.groups, chunks, model.heads), LOSSLESS_ENCODE_JOB)
        self._scratch = torch.empty(jobs.size * scratch, dtype=torch.uint8, device=device)
        number = np.arange(model.groups * chunks, dtype=np.uint64).reshape(model.groups, chunks, 1)
        jobs["payload"] = np.uint64(self._payloads.data_ptr()) + number * np.uint64(self._room)
        jobs["scratch"] = self._scratch.data_ptr() + np.arange(jobs.size).reshape(jobs.shape) * scratch
        jobs["tokens"], jobs["layers"], jobs["kinds"] = model.tokens, model.group, 2
        jobs["token_begin"] = (np.arange(chunks) * model.tokens)[None, :, None]
        jobs["layer_begin"] = (np.arange(model.groups) * model.group)[:, None, None]
        jobs["heads"] = model.heads
        jobs["head"] = jobs["index"] = np.arange(model.heads)
        self._jobs = torch.from_numpy(jobs.reshape(-1).view(np.uint8)).to(device)
        self._count = jobs.size
        self.lengths = torch.zeros(jobs.size, dtype=torch.int32, device=device)

    @staticmethod
    def bytes_needed(sections: Sections, chunks: int) -> int:
        """Device memory: the cache, payloads with room for the worst, and scratch as large."""
        return 3 * chunks * sections.model.chunk_bytes + chunks * sections.model.chunk_bytes // 8

    @property
    def bytes_in(self) -> int:
        return self.chunks * self._sections.model.chunk_bytes

    def run(self, library: Library, stream: int) -> None:
        library.call(
            "kvs_lossless_encode",
            ctypes.c_void_p(self._jobs.data_ptr()),
            ctypes.c_uint32(self._count),
            ctypes.byref(self._cache.pages),
            ctypes.c_void_p(self.lengths.data_ptr()),
            ctypes.c_void_p(stream),
        )

    def check(self) -> None:
        """The first and the last payload are the CPU's, byte for byte. Raises `AssertionError`."""
        model = self._sections.model
        for chunk, group in ((0, 0), (self.chunks - 1, model.groups - 1)):
            expected = self._sections.payloads[self._sections.pick(chunk, group)]
            begin = (group * self.chunks + chunk) * self._room
            found = self._payloads[begin : begin + len(expected)].cpu().numpy().tobytes()
            assert found == expected, f"chunk {chunk}, layer group {group} was coded otherwise"


def _fill(cache: PagedCache, sections: Sections, chunks: int, device: torch.device) -> None:
    values = [torch.from_numpy(value.view(np.int16)).view(torch.bfloat16).to(device) for value in sections.values]
    for group in range(sections.model.groups):
        for chunk in range(chunks):
            cache.write(sections.model, chunk, group, values[sections.pick(chunk, group)])
