"""What the encoder is told of a section by those who know its codec: jobs, and how their results are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvstore_s3.codec.device.library import Pages

EncodeJobs: TypeAlias = npt.NDArray[np.void]
Lengths: TypeAlias = npt.NDArray[np.uint32]
"""Bytes of streams, [jobs, lengths of each]."""


class EncodeWork(Protocol):
    """What kernel jobs are for. Jobs of equal works are launched together."""

    @property
    def lengths(self) -> int:
        """Lengths that the device gives for each job."""

    def launch(self, jobs: EncodeJobs, pages: Pages, *, at: int, lengths: int, stream: int) -> None:
        """Queue `jobs`, of which the device has a copy `at` an address; their lengths go to the address `lengths`."""


class EncodePlan(Protocol):
    """One section. What its jobs point to stays as long as the plan does."""

    @property
    def work(self) -> EncodeWork: ...

    @property
    def jobs(self) -> EncodeJobs:
        """Without the addresses that `place` gives them."""

    @property
    def header(self) -> npt.NDArray[np.uint8]:
        """Bytes that its payload begins with, and the device is to have; may be empty."""

    @property
    def angles(self) -> Sequence[npt.NDArray[np.float32]]:
        """Arrays that the device is to have; plans of one chunk may share them."""

    @property
    def payload_bytes(self) -> int:
        """The most that all levels may take together."""

    @property
    def scratch_bytes(self) -> int: ...

    def place(self, payload: int, scratch: int, header: int, angles: Sequence[int]) -> EncodeJobs:
        """The jobs with these device addresses, each a multiple of 16."""

    def level_sizes(self, lengths: Lengths) -> Sequence[int] | None:
        """Bytes of each level, which lie one behind the other, from what the device gave; None: for the CPU."""
