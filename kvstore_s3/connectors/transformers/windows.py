"""Which pieces of the documents a calibration looks at. Pure.

A window is a context, whose KV is what will be stored, and a continuation, whose prediction shows what an error in that
KV does. Most contexts are one chunk long; some are longer, so that positions beyond the first chunk are seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from kvstore_s3.errors import InvalidArgumentError

CONTINUATION = 127
"""Tokens that are predicted from a context."""

LONG_CHUNKS = 4
"""Chunks of a long context."""

LONG_EVERY = 8
"""One window in so many is a long one."""

HELD_OUT_EVERY = 5
HELD_OUT_MOST = 16
FEWEST = 8
"""Windows without which there is nothing to learn from: six to learn, two to measure on."""


@dataclass(frozen=True, slots=True)
class Window:
    """Token ids: the context first, then the continuation."""

    tokens: tuple[int, ...]
    context: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The windows that are learned from, and those that quality is measured on."""

    training: tuple[Window, ...]
    held_out: tuple[Window, ...]

    @property
    def tokens(self) -> int:
        return sum(len(window.tokens) for window in (*self.training, *self.held_out))


def plan_windows(
    documents: Iterable[Sequence[int]],
    *,
    prefix: Sequence[int] = (),
    chunk_tokens: int,
    max_tokens: int,
    context_tokens: int | None = None,
) -> Sample:
    """Cut documents (token ids without `prefix`) into windows, each with the special tokens `prefix` in front.

    Where there are more than `max_tokens` tokens, windows are left out evenly. Documents shorter than a window, and
    what is left of longer ones, are joined. Windows fit into `context_tokens`, the model's own limit. Raises
    `InvalidArgumentError` where the text is too short.
    """
    short = _limit_context(chunk_tokens, context_tokens)
    windows = _cut(documents, tuple(prefix), short, _long_context(chunk_tokens, short, context_tokens))
    needed = FEWEST * (short + CONTINUATION)
    if max_tokens < needed:
        raise InvalidArgumentError(f"a calibration needs at least {needed:,} tokens; {max_tokens:,} are allowed")
    if len(windows) < FEWEST:
        found = sum(len(window.tokens) for window in windows)
        raise InvalidArgumentError(
            f"too little text to calibrate with: {found:,} usable tokens, at least {needed:,} are needed; "
            "give more documents"
        )
    return _split(_thin(windows, max_tokens, short), short)


def _limit_context(chunk_tokens: int, context_tokens: int | None) -> int:
    """A chunk, or less where the model's context is shorter than a chunk and a continuation."""
    limit = context_tokens or chunk_tokens + CONTINUATION
    if limit <= CONTINUATION + 16:
        raise InvalidArgumentError(f"the model's context of {limit} tokens is too short to calibrate")
    return min(chunk_tokens, limit - CONTINUATION)


def _long_context(chunk_tokens: int, short: int, context_tokens: int | None) -> int:
    room = (context_tokens or LONG_CHUNKS * chunk_tokens + CONTINUATION) - CONTINUATION
    return max(short, min(LONG_CHUNKS, room // chunk_tokens) * chunk_tokens)


def _cut(documents: Iterable[Sequence[int]], prefix: tuple[int, ...], short: int, long: int) -> list[Window]:
    windows: list[Window] = []
    rest: list[int] = []
    for document in documents:
        start = 0
        while True:
            context = long if len(windows) % LONG_EVERY == LONG_EVERY - 1 else short
            taken = context + CONTINUATION - len(prefix)
            if len(document) - start < taken:
                context, taken = short, short + CONTINUATION - len(prefix)
            if len(document) - start < taken:
                break
            windows.append(Window((*prefix, *document[start : start + taken]), context))
            start += taken
        rest.extend(document[start:])
    taken = short + CONTINUATION - len(prefix)
    for start in range(0, len(rest) - taken + 1, taken):
        windows.append(Window((*prefix, *rest[start : start + taken]), short))
    return windows


def _thin(windows: list[Window], max_tokens: int, short: int) -> list[Window]:
    """Leave windows of both lengths out evenly; where few may stay, the long ones go first."""
    total = sum(len(window.tokens) for window in windows)
    if total <= max_tokens:
        return windows
    small = [place for place, window in enumerate(windows) if window.context == short]
    large = [place for place, window in enumerate(windows) if window.context != short]
    places = [place for some in (small, large) for place in _pick(some, len(some) * max_tokens // total)]
    if len(places) < FEWEST:
        places = _pick(small if len(small) >= FEWEST else [*range(len(windows))], FEWEST)
    return [windows[place] for place in sorted(places)]


def _pick(places: list[int], count: int) -> list[int]:
    return [places[number * len(places) // count] for number in range(count)]


def _split(windows: list[Window], short: int) -> Sample:
    """Every few of the short windows are held out."""
    places = [place for place, window in enumerate(windows) if window.context == short]
    wanted = min(max(2, len(places) // HELD_OUT_EVERY), HELD_OUT_MOST)
    held = {places[(2 * number + 1) * len(places) // (2 * wanted)] for number in range(wanted)}
    training = tuple(window for place, window in enumerate(windows) if place not in held)
    return Sample(training, tuple(windows[place] for place in sorted(held)))


def batch_windows(windows: Iterable[Window], batch_tokens: int) -> list[tuple[torch.Tensor, int]]:
    """Windows of equal shape together, at most `batch_tokens` a batch: token ids int64 [windows, tokens], context."""
    by_shape: dict[tuple[int, int], list[Window]] = {}
    for window in windows:
        by_shape.setdefault((len(window.tokens), window.context), []).append(window)
    batches = []
    for (length, context), group in by_shape.items():
        size = max(1, batch_tokens // length)
        for start in range(0, len(group), size):
            rows = [window.tokens for window in group[start : start + size]]
            batches.append((torch.tensor(rows, dtype=torch.long), context))
    return batches
