"""Pages of vLLM's CPU attention, unpacked to the canonical layout and packed back. Pure: no vLLM here.

A layer's cache has shape [blocks, kv heads, block tokens, 2 * head dim], but on a CPU a page is not sliced by token:
each head's page is a K half followed by a V half, and each half holds its block_tokens x head_dim values in the order
that the attention kernel of the instruction set wants. A `Packing` names that order for both halves.

An order is spelled outermost axis first: "d t" is [dim][token], "t d t16 d2" is [token / 16][dim / 2][16][2]. Where an
axis occurs twice, the sized one holds its low part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from torch import Tensor

Bits = npt.NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Packing:
    """Order of values in the K half and in the V half of a page."""

    name: str
    keys: str
    values: str


PACKINGS = (
    Packing("vec", keys="d t", values="t d"),
    Packing("amx", keys="t d t16 d2", values="d t d16 t2"),
    Packing("neon bfmmla", keys="t d t8 d4", values="d t d2 t4"),
)
"""The packings that are understood. Which of them an engine uses is not looked up but found out: `recognise`."""


@dataclass(frozen=True, slots=True)
class _Axes:
    """One half of a page as a tensor: its stored shape, and where the token and dim axes are in it."""

    shape: tuple[int, ...]
    tokens: tuple[int, ...]
    dims: tuple[int, ...]

    def sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)


def read_blocks(cache: Tensor, block_ids: Sequence[int], packing: Packing, *, out: Tensor) -> None:
    """Unpack the blocks of one layer into `out`, in the order of `block_ids`.

    `cache` is [blocks, kv heads, block tokens, 2 * head dim], packed; `out` is canonical,
    [2, len(block_ids) * block tokens, kv heads, head dim], of the same dtype. Bits are kept.
    """
    for stored, rows in _matching_views(cache, block_ids, packing, out):
        np.copyto(rows, stored)


def write_blocks(cache: Tensor, block_ids: Sequence[int], packing: Packing, *, kv: Tensor) -> None:
    """Pack canonical `kv` into whole blocks of one layer; shapes as in `read_blocks`. No other block is touched."""
    for stored, rows in _matching_views(cache, block_ids, packing, kv):
        np.copyto(stored, rows)


def read_tokens(
    caches: Sequence[Tensor], block_ids: Sequence[int], packing: Packing, *, begin: int, end: int
) -> Tensor:
    """Return tokens `begin` to `end` of a request as canonical [layers, 2, end - begin, kv heads, head dim].

    `caches` are the layers' caches in layer order. `block_ids` are the blocks from the one that holds token `begin` to
    the one that holds token `end - 1`; neither needs to start or end there.
    """
    _, heads, block_tokens, width = caches[0].shape
    skip = begin % block_tokens
    if len(block_ids) != (end + block_tokens - 1) // block_tokens - begin // block_tokens:
        raise ValueError(f"{len(block_ids)} blocks of {block_tokens} tokens do not span tokens {begin} to {end}")
    shape = (len(caches), 2, len(block_ids) * block_tokens, heads, width // 2)
    kv = torch.empty(shape, dtype=caches[0].dtype)
    for layer, cache in enumerate(caches):
        read_blocks(cache, block_ids, packing, out=kv[layer])
    return kv[:, :, skip : skip + end - begin].contiguous()


def recognise(page: Tensor, keys: Tensor, values: Tensor) -> Packing | None:
    """Return the packing under which `page` holds `keys` and `values`, or None where no known packing does.

    `page` is [kv heads, block tokens, 2 * head dim] as the engine's own kernel wrote it from `keys` and `values`, both
    [block tokens, kv heads, head dim], in the page's dtype. Give random values, or more than one packing may fit.
    """
    for packing in PACKINGS:
        if not _divides(packing, page.shape[1], page.shape[2] // 2):
            continue
        found = torch.empty((2, *keys.shape), dtype=page.dtype)
        read_blocks(page[None], [0], packing, out=found)
        if _same_bits(found[0], keys) and _same_bits(found[1], values):
            return packing
    return None


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def _matching_views(
    cache: Tensor, block_ids: Sequence[int], packing: Packing, kv: Tensor
) -> Iterator[tuple[Bits, Bits]]:
    """Pair each half of each page with its rows of canonical `kv`, as views of one shape.

    The shape is [*token axes, kv heads, *dim axes]: copying one into the other packs or unpacks. Page by page, because
    a gather of pages would cost one more pass over memory. The views are numpy's: torch would copy with OpenMP, whose
    threads, one set for each thread that copies, would take the model's cores.
    """
    cache, kv = _as_integers(cache), _as_integers(kv)
    blocks, heads, block_tokens, width = cache.shape
    head_dim = width // 2
    halves = cache.view(blocks, heads, 2, block_tokens * head_dim)
    for half, order in enumerate((packing.keys, packing.values)):
        axes = _parse(order, block_tokens, head_dim)
        to_rows = (*(1 + axis for axis in axes.tokens), 0, *(1 + axis for axis in axes.dims))
        stored = halves[:, :, half].view(blocks, heads, *axes.shape)
        rows = kv[half].view(len(block_ids), *axes.sizes(axes.tokens), heads, *axes.sizes(axes.dims))
        for row, block in enumerate(block_ids):
            yield stored[block].permute(to_rows).numpy(), rows[row].numpy()


def _as_integers(values: Tensor) -> Tensor:
    """The same bits in a dtype that numpy has."""
    return values.view(getattr(torch, f"int{8 * values.itemsize}"))


def _parse(order: str, block_tokens: int, head_dim: int) -> _Axes:
    left = {"t": block_tokens, "d": head_dim}
    words = order.split()
    shape = [0] * len(words)
    for position in reversed(range(len(words))):
        axis, size = words[position][0], words[position][1:]
        shape[position] = int(size) if size else left[axis]
        left[axis] //= shape[position]
    where = {name: tuple(i for i, word in enumerate(words) if word[0] == name) for name in "td"}
    return _Axes(tuple(shape), where["t"], where["d"])


def _divides(packing: Packing, block_tokens: int, head_dim: int) -> bool:
    sizes = {"t": block_tokens, "d": head_dim}
    words = f"{packing.keys} {packing.values}".split()
    return all(sizes[word[0]] % int(word[1:]) == 0 for word in words if word[1:])
