"""Which objects of a chunk make up a rectangle of layers x KV heads, and which part each of them gives. Pure.

Writers cut the model into rectangles as their engine is partitioned; a reader has a rectangle of its own. Where tiles
overlap, each place of the reader's rectangle is taken from one of them alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore_s3.layout import Shard


def meet(one: Shard, other: Shard) -> Shard | None:
    """What both rectangles share; None: nothing."""
    layer_begin, layer_end = max(one.layer_begin, other.layer_begin), min(one.layer_end, other.layer_end)
    head_begin, head_end = max(one.head_begin, other.head_begin), min(one.head_end, other.head_end)
    if layer_begin >= layer_end or head_begin >= head_end:
        return None
    return Shard(layer_begin, layer_end, head_begin, head_end)


def cut_cover(wanted: Shard, tiles: Sequence[Shard]) -> list[tuple[int, Shard]] | None:
    """Cut `wanted` into pieces, each inside the tile of the number beside it; None where `tiles` do not cover it.

    Of the tiles that hold a corner, the one with the largest share is taken, the first of equals; what it leaves is cut
    again. As every rest lies in what the tiles cover together, no choice leads astray.
    """
    pieces: list[tuple[int, Shard]] = []
    rest = [wanted]
    while rest:
        area = rest.pop()
        found = _largest_at_corner(area, tiles)
        if found is None:
            return None
        number, piece = found
        pieces.append((number, piece))
        if piece.layer_end < area.layer_end:
            rest.append(Shard(piece.layer_end, area.layer_end, area.head_begin, area.head_end))
        if piece.head_end < area.head_end:
            rest.append(Shard(piece.layer_begin, piece.layer_end, piece.head_end, area.head_end))
    return pieces


def holds_corner(tile: Shard, wanted: Shard) -> bool:
    """Whether `tile` has the first layer and head of `wanted`, as one tile of every cover must."""
    return (
        tile.layer_begin <= wanted.layer_begin < tile.layer_end and tile.head_begin <= wanted.head_begin < tile.head_end
    )


def _largest_at_corner(area: Shard, tiles: Sequence[Shard]) -> tuple[int, Shard] | None:
    best: tuple[int, Shard] | None = None
    for number, tile in enumerate(tiles):
        piece = meet(area, tile) if holds_corner(tile, area) else None
        if piece is not None and (best is None or _size(piece) > _size(best[1])):
            best = number, piece
    return best


def _size(shard: Shard) -> int:
    return shard.layers * shard.heads
