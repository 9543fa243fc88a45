"""Exact ideal code lengths, in bits, under tables that are counted per chunk or learned before."""

from __future__ import annotations

import torch

SMALLEST = 2.0**-14
"""Least probability of a symbol in a learned table: what a coder with tables of 16 bits can give."""


def count_symbols(symbols: torch.Tensor, size: int) -> torch.Tensor:
    """How often each component takes each value. `symbols` int64 [samples, n], 0 to size - 1; float64 [n, size]."""
    n = symbols.shape[1]
    places = torch.arange(n) * size + symbols
    return torch.bincount(places.flatten(), minlength=n * size).view(n, size).double()


def learn_tables(symbols: torch.Tensor, size: int, weight: float = 8.0) -> torch.Tensor:
    """Probabilities of each component's symbols, float64 [n, size], from counts and a two-sided geometric prior.

    The prior, of the sample's own mean magnitude around the middle symbol, counts as much as `weight` samples.
    """
    counts = count_symbols(symbols, size)
    magnitude = (torch.arange(size) - size // 2).abs().double()
    mean = (counts * magnitude).sum(1) / counts.sum(1)
    decay = (mean / (1 + mean)).clamp_min(1e-4)[:, None]
    prior = decay**magnitude
    prior /= prior.sum(1, keepdim=True)
    found = counts + weight * prior
    found = (found / found.sum(1, keepdim=True)).clamp_min(SMALLEST)
    return found / found.sum(1, keepdim=True)


def static_length(symbols: torch.Tensor, tables: torch.Tensor) -> float:
    """Bits of `symbols` int64 [samples, n] under `tables` [n, size]."""
    return float(-tables.log2()[torch.arange(symbols.shape[1]), symbols].sum())


def scaled_counts(symbols: torch.Tensor, size: int, total: int = 65536) -> torch.Tensor:
    """Cumulative frequencies as torchac and LMCache make them: int64 [n, size + 1], 0 to `total`.

    Every symbol has at least 1, and the rest is shared in proportion to `symbols` int64 [samples, n].
    """
    counts = count_symbols(symbols, size)
    shares = torch.cat([torch.zeros(len(counts), 1).double(), counts.cumsum(1) / symbols.shape[0]], 1)
    return (shares * (total - size)).round().long() + torch.arange(size + 1)


def stream_lengths(symbols: torch.Tensor, cumulative: torch.Tensor) -> torch.Tensor:
    """Ideal bits of each component's stream, float64 [n], under its cumulative frequencies [n, size + 1]."""
    frequencies = cumulative.diff(dim=1).double()
    bits = (cumulative[:, -1:].double() / frequencies).log2()
    return bits.gather(1, symbols.T).sum(1)
