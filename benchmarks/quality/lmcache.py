"""CacheGen as LMCache stores it: per-token maxima, and an arithmetic code with tables of its own for every channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from quality.code_length import scaled_counts, stream_lengths
from quality.measure import Coded


@cache
def load_torchac() -> Any | None:
    """The arithmetic coder, compiled at its first import; None where it or its compiler is absent."""
    try:
        import torchac
    except (ImportError, OSError, RuntimeError):
        return None
    return torchac


@dataclass(frozen=True, slots=True)
class LmcacheCacheGen:
    """Y. Liu et al., "CacheGen: KV Cache Compression and Streaming for Fast LLM Serving", arXiv:2310.07240, in the
    form that LMCache's serializer gives it: no anchor tokens and no deltas; each token of a layer's K, and of its V, is
    divided by its largest magnitude and rounded to `bins` levels; each (layer, channel) is a stream of arithmetic
    code under a 16-bit table of cumulative counts of this chunk. Stored: streams, a 32-bit length of each, the tables
    (bins + 1 entries), a bfloat16 maximum of each token. Pickling is not counted.

    A model of fewer than 10 layers has 32 bins everywhere there; others 32 in the first 10 layers of K and the first 2
    of V, else 16. The code is torchac's where it can be had; else its ideal length, each stream rounded up to bytes.
    """

    key_bins: list[int]
    value_bins: list[int]
    setting: str
    curve: str = "CacheGen (LMCache)"

    @property
    def timed(self) -> bool:
        return load_torchac() is not None

    def encode(self, chunk: torch.Tensor, first_position: int) -> Coded:
        layers, _, _, heads, dim = chunk.shape
        rows = chunk.float().flatten(3).transpose(0, 1).flatten(0, 1)  # K of all layers, then V
        half = torch.tensor(self.key_bins + self.value_bins)[:, None, None] // 2 - 1
        largest = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.bfloat16).tiny)
        symbols = (rows * (half / largest) + half).round().long()
        sizes = [max(self.key_bins)] * layers + [max(self.value_bins)] * layers
        tables = [scaled_counts(part, size) for part, size in zip(symbols, sizes, strict=True)]
        streams = self._code(symbols, tables)
        bits = {
            "streams": 8.0 * sum(map(len, streams)) if streams else ideal_bits(symbols, tables),
            "stream lengths": 32.0 * 2 * layers * heads * dim,
            "tables": 16.0 * sum(table.numel() for table in tables),
            "maxima": 16.0 * largest.numel(),
        }
        return Coded(bits, (streams or symbols, tables, largest.bfloat16(), half, chunk.shape))

    def decode(self, coded: Coded, first_position: int) -> torch.Tensor:
        symbols, tables, largest, half, (layers, _, tokens, heads, dim) = coded.data
        if isinstance(symbols, list):
            symbols = self._decode_streams(symbols, tables, tokens)
        rows = (symbols - half).float() / half * largest.float()
        return rows.view(2, layers, tokens, heads, dim).transpose(0, 1).bfloat16()

    def _code(self, symbols: torch.Tensor, tables: list[torch.Tensor]) -> list[bytes]:
        """The streams of all channels in order; none where torchac is absent."""
        coder = load_torchac()
        if coder is None:
            return []
        streams = symbols.transpose(1, 2).to(torch.int16).flatten(0, 1).contiguous()
        pairs = zip(spread_tables(tables, symbols.shape[1]), streams, strict=True)
        return [coder.encode_int16_normalized_cdf(table, stream) for table, stream in pairs]

    def _decode_streams(self, streams: list[bytes], tables: list[torch.Tensor], tokens: int) -> torch.Tensor:
        coder = load_torchac()
        assert coder is not None
        pairs = zip(spread_tables(tables, tokens), streams, strict=True)
        found = torch.stack([coder.decode_int16_normalized_cdf(table, stream) for table, stream in pairs])
        return found.view(len(tables), -1, tokens).transpose(1, 2).long()


def spread_tables(tables: list[torch.Tensor], tokens: int) -> Iterator[torch.Tensor]:
    """A channel's table once for each of its tokens, as torchac wants it: int16 [tokens, size + 1], 65536 as 0."""
    for layer in tables:
        for table in layer.to(torch.int32).to(torch.int16):
            yield table.repeat(tokens, 1)


def ideal_bits(symbols: torch.Tensor, tables: list[torch.Tensor]) -> float:
    """Ideal length of all streams, each rounded up to bytes."""
    lengths = [(stream_lengths(part, table) / 8).ceil() for part, table in zip(symbols, tables, strict=True)]
    return 8 * float(torch.cat(lengths).sum())


def levels_for(layers: int) -> tuple[list[int], list[int]]:
    """LMCache's own bins for K and V of a model that it has no entry for."""
    if layers < 10:
        return [32] * layers, [32] * layers
    return [32] * 10 + [16] * (layers - 10), [32] * 2 + [16] * (layers - 2)
