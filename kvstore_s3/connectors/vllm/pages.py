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

from kvstore_s3.codec.blocks import gather_blocks, scatter_blocks

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


class Pages:
    """The pages of some layers, packed, as arrays that are indexed like canonical KV. Made once: copies are frequent.

    `caches` are the layers' caches in layer order, each [blocks, kv heads, block tokens, 2 * head dim].
    """

    def __init__(self, caches: Sequence[Tensor], packing: Packing) -> None:
        _, self._heads, self.block_tokens, width = caches[0].shape
        self._dim, self._dtype = width // 2, caches[0].dtype
        self._axes = [_parse(order, self.block_tokens, self._dim) for order in (packing.keys, packing.values)]
        self._layers = [[_as_rows(cache, half, axes) for half, axes in enumerate(self._axes)] for cache in caches]

    def read(self, block_ids: Sequence[int], *, out: Tensor) -> None:
        """Unpack blocks of all layers into `out`, in the order of `block_ids`.

        `out` is canonical, [layers, 2, len(block_ids) * block tokens, kv heads, head dim], of the caches' dtype. Bits
        are kept. Raises ValueError for a block that is not there.
        """
        numbers = np.array(block_ids, np.int64)
        for pages, rows in self._pairs(0, len(numbers), out):
            gather_blocks(pages, numbers, rows)

    def write(self, block_ids: Sequence[int], *, kv: Tensor, layer: int = 0) -> None:
        """Pack canonical `kv` into whole blocks, from layer number `layer` on; as in `read`. No other is touched."""
        numbers = np.array(block_ids, np.int64)
        for pages, rows in self._pairs(layer, len(numbers), kv):
            scatter_blocks(pages, numbers, rows)

    def read_tokens(self, block_ids: Sequence[int], *, begin: int, end: int) -> Tensor:
        """Return tokens `begin` to `end` of a request as canonical [layers, 2, end - begin, kv heads, head dim].

        `block_ids` are the blocks from the one that holds token `begin` to the one that holds token `end - 1`; neither
        needs to start or end there.
        """
        size = self.block_tokens
        if len(block_ids) != (end + size - 1) // size - begin // size:
            raise ValueError(f"{len(block_ids)} blocks of {size} tokens do not span tokens {begin} to {end}")
        kv = torch.empty((len(self._layers), 2, len(block_ids) * size, self._heads, self._dim), dtype=self._dtype)
        self.read(block_ids, out=kv)
        skip = begin % size
        return kv[:, :, skip : skip + end - begin].contiguous()

    def _pairs(self, layer: int, count: int, kv: Tensor) -> Iterator[tuple[Bits, Bits]]:
        """The halves of each layer's pages, and the rows of `count` of them in `kv`, with the same axes.

        The arrays are numpy's: torch would copy with OpenMP, whose threads, one set for each thread that copies, would
        take the model's cores.
        """
        kv = _as_integers(kv)
        layers, _, _, heads, _ = kv.shape
        for half, axes in enumerate(self._axes):
            shape = (layers, count, *axes.sizes(axes.tokens), heads, *axes.sizes(axes.dims))
            rows = kv[:, half].view(shape).numpy()
            for number in range(layers):
                yield self._layers[layer + number][half], rows[number]


def recognise(page: Tensor, keys: Tensor, values: Tensor) -> Packing | None:
    """Return the packing under which `page` holds `keys` and `values`, or None where no known packing does.

    `page` is [kv heads, block tokens, 2 * head dim] as the engine's own kernel wrote it from `keys` and `values`, both
    [block tokens, kv heads, head dim], in the page's dtype. Give random values, or more than one packing may fit.
    """
    for packing in PACKINGS:
        if not _divides(packing, page.shape[1], page.shape[2] // 2):
            continue
        found = torch.empty((1, 2, *keys.shape), dtype=page.dtype)
        Pages([page[None]], packing).read([0], out=found)
        if _same_bits(found[0, 0], keys) and _same_bits(found[0, 1], values):
            return packing
    return None


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def _as_rows(cache: Tensor, half: int, axes: _Axes) -> Bits:
    """The K or the V half of all pages: [blocks, *token axes, kv heads, *dim axes]."""
    blocks, heads, block_tokens, width = cache.shape
    halves = _as_integers(cache).view(blocks, heads, 2, block_tokens * width // 2)
    to_rows = (0, *(2 + axis for axis in axes.tokens), 1, *(2 + axis for axis in axes.dims))
    return halves[:, :, half].view(blocks, heads, *axes.shape).permute(to_rows).numpy()


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
