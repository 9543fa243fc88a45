"""How far a load by layer has come, for the thread that computes layer after layer. Pure."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvstore_s3.codec.device.streams import Mark


class LayerGate:
    """How far a load has come, for the thread that computes layer after layer and needs their KV."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._layers = 0
        self._ended = False
        self._queued: dict[tuple[int, int], list[Mark]] = {}
        self._shares: dict[tuple[int, int], int] = {}

    def advance(self, layers: int) -> None:
        """Layers below `layers`, in the model's numbers, are there."""
        with self._changed:
            self._layers = max(self._layers, layers)
            self._changed.notify_all()

    def note_queued(self, layer_begin: int, layer_end: int, marks: Sequence[Mark], *, shares: int) -> None:
        """One of the `shares` of these layers will be there behind `marks` in the device's queue."""
        layers = (layer_begin, layer_end)
        with self._changed:
            self._queued.setdefault(layers, []).extend(marks)
            self._shares[layers] = self._shares.get(layers, shares) - 1
            whole = {begin: end for (begin, end), left in self._shares.items() if not left}
            while self._layers in whole:
                self._layers = whole[self._layers]
            self._changed.notify_all()

    def end(self) -> None:
        """The load has ended, well or not: nobody need wait any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self, layer: int) -> list[Mark]:
        """Return once `layer` is there, will be behind these marks, or the load has ended. Marks are given once."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or layer < self._layers)
            found = [layers for layers in self._queued if layers[0] <= layer < layers[1]]
            marks = [mark for layers in found for mark in self._queued.pop(layers)]
        return list({id(mark): mark for mark in marks}.values())

    def wait_for_end(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended)
