"""Which chunks were asked for before: a memory of bounded size, for saving at the second sight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore_s3.hashing import KEY_BYTES

_WAYS = 8
"""Places that a key may be in; where all are taken, the one that was seen longest ago is forgotten."""


class Sights:
    """Chunk keys that were seen, by their first 8 bytes. For one thread.

    `capacity` keys take 12 bytes each. Once it is full, those seen longest ago are forgotten, roughly: of the `_WAYS`
    places which the key's own bits choose. Chunk keys are digests, so they spread evenly and two are never taken for
    one (1 in 2^60).
    """

    def __init__(self, capacity: int = 1 << 20) -> None:
        sets = 1 << max(0, (max(capacity, _WAYS) // _WAYS - 1).bit_length())
        self._marks: NDArray[np.uint64] = np.zeros((sets, _WAYS), dtype=np.uint64)
        self._seen_at: NDArray[np.uint32] = np.zeros((sets, _WAYS), dtype=np.uint32)
        self._notes = 0

    def note(self, keys: Sequence[bytes]) -> int:
        """Remember the keys of a prompt's chunks, in order; return how many leading ones were seen before.

        Once for each request: a second call for the same one would take it for another.
        """
        if not keys:
            return 0
        self._notes += 1
        marks = np.frombuffer(b"".join(keys), dtype="<u8").reshape(len(keys), KEY_BYTES // 8)[:, 0]
        marks = np.maximum(marks, np.uint64(1))  # 0 is an empty place
        sets = (marks & np.uint64(len(self._marks) - 1)).astype(np.intp)
        new = self._refresh(marks, sets)
        leading = len(keys) if not new.any() else int(np.argmax(new))
        for _ in range(
            _WAYS
        ):  # of two new keys of one set the second takes the first one's place; that one tries again
            if not new.any():
                break
            marks, sets = marks[new], sets[new]
            self._marks[sets, self._seen_at[sets].argmin(axis=1)] = marks
            new = self._refresh(marks, sets)
        return leading

    def _refresh(self, marks: NDArray[np.uint64], sets: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Note that those of `marks` that are there were seen now; return which are not."""
        found = self._marks[sets] == marks[:, None]
        rows, ways = np.nonzero(found)
        self._seen_at[sets[rows], ways] = self._notes
        new = np.ones(len(marks), dtype=np.bool_)
        new[rows] = False
        return new
