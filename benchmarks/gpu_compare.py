"""Comparing all that came out of a GPU with what the CPU has, on the GPU itself: every section, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gpu_cases import Model, PagedCache, pick

from kvstore_s3.codec.base import Bits

AT_ONCE = 2**26
"""Bytes of values or payloads that are compared at a time; comparing takes some ten times as much memory."""
EXPONENT = 0x7F80
"""Bits of a bf16 that are the power of two below it."""


@dataclass(frozen=True, slots=True)
class Near:
    """How far values may be from those expected: a unit in the last place, and `off` of the largest of the section;
    and the share of them that may differ at all.
    """

    off: float
    share: float


SUMS = Near(2.0**-20, 5e-3)
"""Sums of floats in another order (docs/FORMAT.md)."""
PRODUCTS = Near(2.0**-10, 0.25)
"""Components rounded to float16 before they are multiplied, as docs/FORMAT.md allows: of the values here one in ten
comes out as its neighbour."""


class Expected:
    """What every section must have come to, [sections][group, 2, tokens, heads, dim], taken in turn: the same bits, or
    values `near` them.
    """

    def __init__(self, values: Sequence[Bits], near: Near | None = None) -> None:
        self._values, self._near = values, near

    def check(self, cache: PagedCache, model: Model, chunks: int) -> None:
        """Raises `AssertionError` where one of all sections of `chunks` chunks is not what it must be."""
        device = cache.values.device
        expected = torch.from_numpy(np.stack(self._values).view(np.int16)).to(device)
        found = []
        for group in range(model.groups):
            for part in split(chunks, 2 * self._values[0].size):
                picks = [pick(model, len(self._values), chunk, group) for chunk in part]
                wanted = expected[torch.tensor(picks, device=device)]
                found.append(self._find_wrong(cache.take(group, part).view(torch.int16), wanted))
        tell_wrong(torch.cat(found).cpu().numpy().reshape(model.groups, chunks))

    def _find_wrong(self, found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """Which of some sections are wrong; both int16 [sections, ...]."""
        differ = (found != expected).flatten(1)
        if self._near is None:
            return differ.any(1)
        known = expected.view(torch.bfloat16).float()
        away = (found.view(torch.bfloat16).float() - known).abs().flatten(1)
        unit = (expected & EXPONENT).view(torch.bfloat16).float().flatten(1) * 2.0**-7
        largest = known.abs().flatten(1).amax(1, keepdim=True)
        near = away <= unit + self._near.off * largest  # not of what is no number
        return ~near.all(1) | (differ.sum(1) > max(2, self._near.share * differ.shape[1]))


class ExpectedPayloads:
    """What every section must have been coded to, taken in turn."""

    def __init__(self, payloads: Sequence[bytes], device: torch.device) -> None:
        self._lengths = torch.tensor([len(payload) for payload in payloads], device=device)
        longest = max(map(len, payloads))
        padded = [np.frombuffer(payload.ljust(longest, b"\0"), np.uint8) for payload in payloads]
        self._bytes = torch.from_numpy(np.stack(padded)).to(device)

    def find_wrong(self, found: torch.Tensor, picks: Sequence[int]) -> np.ndarray:
        """Which sections are not the payload that `picks` has for them; uint8 [sections, room], on the device."""
        longest = self._bytes.shape[1]
        which = torch.tensor(picks, device=found.device)
        column = torch.arange(longest, device=found.device)
        wrong = []
        for part in split(len(found), longest):
            mine = which[part.start : part.stop]
            differ = found[part.start : part.stop, :longest] != self._bytes[mine]
            wrong.append((differ & (column < self._lengths[mine, None])).any(1))
        return torch.cat(wrong).cpu().numpy()


def split(count: int, size: int) -> Iterator[range]:
    """0 to `count` in parts, where each has `size` bytes."""
    most = max(1, AT_ONCE // size)
    return (range(first, min(first + most, count)) for first in range(0, count, most))


def tell_wrong(wrong: np.ndarray) -> None:
    """Raises `AssertionError` where [groups, chunks] says that a section is."""
    if wrong.any():
        group, chunk = (int(number) for number in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.size} sections came out wrong, such as chunk {chunk}, layer group {group}"
        )


class WrongRowError(AssertionError):
    """What came out is wrong; `row` says how fast it did."""

    def __init__(self, why: str, row: dict[str, Any]) -> None:
        super().__init__(why)
        self.row = row


def check_row(row: dict[str, Any], check: Callable[[], None]) -> dict[str, Any]:
    """The row, where what it is about is right. Raises `WrongRowError`."""
    try:
        check()
    except AssertionError as error:
        raise WrongRowError(str(error), row) from error
    return row


def check_faults(faults: torch.Tensor, what: str) -> None:
    """Raises `AssertionError` where a job of kernels has one, or has not run."""
    count = int((faults != 0).sum())
    assert not count, f"{count} of {faults.numel()} {what} did not decode"
