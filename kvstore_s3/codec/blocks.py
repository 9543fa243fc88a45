"""Blocks of an engine's cache to and from rows of KV, whatever the order of their axes. The work is native."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_s3 import _native

Items = npt.NDArray[Any]


def scatter_blocks(blocks: Items, numbers: npt.NDArray[np.int64], rows: Items) -> None:
    """`blocks[numbers] = rows`, where the two do not overlap: blocks [blocks, ...], rows [len(numbers), ...].

    Raises ValueError where shapes or item sizes differ, and for a number that is no block's; TypeError where `blocks`
    cannot be written.
    """
    _native.scatter_blocks(blocks, numbers, rows)


def gather_blocks(blocks: Items, numbers: npt.NDArray[np.int64], rows: Items) -> None:
    """`rows[...] = blocks[numbers]`; see `scatter_blocks`."""
    _native.gather_blocks(blocks, numbers, rows)
