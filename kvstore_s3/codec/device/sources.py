"""Memory of a device that is read for a save, and how its owner gets it back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.codec.device.pieces import Target
from kvstore_s3.codec.device.streams import Mark, Streams
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.errors import DeviceError


class RevokedError(DeviceError):
    """Memory that was to be read was taken back by its owner before."""


class Memory(Protocol):
    """Values [layers, 2, tokens, heads, dim] on a device: a tensor, or an engine's blocks."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, index: Any) -> Self:
        """A rectangle of it, or some of the layers: `memory[begin:end,]`."""

    def target(self) -> Target:
        """For kernels."""


class Readable(Memory, Protocol):
    """Memory that is saved."""

    def gather(self, out: torch.Tensor) -> None:
        """Queue the copy into `out` [layers, 2, tokens, heads, dim], contiguous, on the same device."""


class Source:
    """A device's memory that is read, in one queue behind the mark `after`, until its owner takes it back."""

    def __init__(self, after: Mark | None) -> None:
        self.after = after
        self._ends: list[Mark] = []
        self._revoked = False
        self._lock = threading.Lock()

    @contextmanager
    def reading(self, streams: Streams) -> Iterator[None]:
        """What is queued inside reads the memory. Raises `RevokedError` where it was taken back."""
        with self._lock:
            if self._revoked:
                raise RevokedError("the device's memory was taken back before it was read")
            streams.wait_for(self.after)
            try:
                yield
            finally:
                self._ends.append(streams.mark_decoded())

    def revoke(self) -> list[Mark]:
        """Nothing more will be queued that reads the memory; the ends of what was, for its next writer to wait for."""
        with self._lock:
            self._revoked = True
            return self._ends


@dataclass(frozen=True, slots=True, eq=False)
class Lossy:
    """What codec 3 knows of a section beside its values: where in the model its first layer and head are, where in its
    prompt its first token, and how K was rotated there. See `encode_scalable`.
    """

    first_layer: int
    first_head: int
    first_position: int
    levels: int
    calibration: Calibration | None
    rotation: Rotation


@dataclass(frozen=True, slots=True)
class EncodeSection:
    """A range of layers and tokens of some memory, all of its heads: a payload of codec 1, or of codec 3's levels."""

    layer_begin: int
    layers: int
    token_begin: int
    tokens: int
    lossy: Lossy | None = None
