"""What to load and what to save, for one request. Pure: token counts in, ranges out; no vLLM, no store.

All ranges are half-open token ranges of the prompt. A chunk is `chunk_tokens` tokens, the store's unit; a block is
`block_tokens` tokens, the engine's. Neither needs to be a multiple of the other.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple


class TokenRange(NamedTuple):
    """Tokens `begin` to `end` of a prompt, half open."""

    begin: int
    end: int


def floor_to(tokens: int, unit: int) -> int:
    """The largest multiple of `unit` that is not above `tokens`."""
    return tokens // unit * unit


def plan_load(hit_tokens: int, computed: int, *, block_tokens: int) -> TokenRange | None:
    """Which tokens to fetch for a request of which the engine holds `computed` (a block boundary) already.

    `hit_tokens` are in the store. Whole blocks only, because an engine's block is loaded or computed, not both.
    """
    end = floor_to(hit_tokens, block_tokens)
    return TokenRange(computed, end) if end > computed else None


def plan_save(
    stored: int,
    computed: int,
    prompt: int,
    *,
    chunk_tokens: int,
    keys: Sequence[bytes],
    in_flight: Container[bytes],
) -> TokenRange:
    """Which tokens to save once `computed` tokens of a prompt of `prompt` tokens are in the engine's blocks.

    `stored` (a chunk boundary) were found in the store or saved before. Whole chunks of prompt tokens only; leading
    chunks that another request is saving right now (`in_flight`, by key) are left to it. The range may be empty; its
    end is where the next one begins.
    """
    end = max(stored, floor_to(min(computed, prompt), chunk_tokens))
    begin = stored
    while begin < end and keys[begin // chunk_tokens] in in_flight:
        begin += chunk_tokens
    return TokenRange(begin, end)


def spanned_blocks(tokens: TokenRange, block_ids: Sequence[int], *, block_tokens: int) -> tuple[int, ...]:
    """The blocks that hold any of `tokens`, out of all `block_ids` of the request."""
    return tuple(block_ids[tokens.begin // block_tokens : -(-tokens.end // block_tokens)])


def failed_blocks(tokens: TokenRange, good: int, block_ids: Sequence[int], *, block_tokens: int) -> frozenset[int]:
    """Of the blocks that a load of `tokens` was to fill, those not wholly within the first `good` tokens."""
    filled = max(0, floor_to(good, block_tokens) - tokens.begin) // block_tokens
    return frozenset(block_ids[filled:])
