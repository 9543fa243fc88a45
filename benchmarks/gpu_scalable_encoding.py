"""Encoding lossy sections from an engine's blocks on a GPU, with a calibration and without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from gpu_cases import Model, PagedCache
from gpu_encoding import Encoding
from gpu_scalable import FIRST_POSITION, LossySections, decode_on_host

from kvstore_s3.codec.device.encode_plans import EncodePlan
from kvstore_s3.codec.device.library import Library
from kvstore_s3.codec.device.scalable_encode import ScalableEncodeCalls, level_sizes
from kvstore_s3.codec.device.scalable_encode_jobs import ScalableEncodePlan, ScalableEncodePlanner, SectionInPages

MOST_APART = 0.01
"""Share of values that may differ from the CPU's, where a matrix rounds numbers apart."""


class LossyEncoding(Encoding):
    """Objects of so many levels. Each layer group has its own copy of the calibration on the device, as a model's
    groups have.
    """

    def __init__(
        self,
        library: Library,
        sections: LossySections,
        levels: int,
        chunks: int,
        cache: PagedCache,
        device: torch.device,
    ) -> None:
        planner = ScalableEncodePlanner(
            ScalableEncodeCalls(library), lambda values: torch.from_numpy(np.array(values)).to(device)
        )
        model = sections.model
        self._sections, self._levels = sections, levels
        known = sections.calibration
        self._copies = [None if known is None else replace(known) for _ in range(model.groups)]
        plans = [self._plan(planner, sections, group) for group in range(model.groups)]
        plans = [replace(plan, work=plans[0].work, angles=plans[0].angles) for plan in plans]  # one call for all
        super().__init__(model, plans, sections.values, chunks, cache, device)

    @staticmethod
    def bytes_needed(model: Model, chunks: int, *, calibrated: bool) -> float:
        """Device memory: the cache, payloads with room for the worst, and 12 bytes of scratch for each value, 8 without
        a calibration.
        """
        return (8.1 if calibrated else 6.2) * chunks * model.chunk_bytes + 2**28

    def expected(self, which: int, found: list[bytes]) -> Sequence[bytes]:
        """The CPU's; with a calibration, `found` where that is up to a step in few numbers the same. (All others of the
        same values must be `found` byte for byte then.) Raises `AssertionError`.
        """
        expected = self._sections.encode_on_host(which, self._levels)
        if self._sections.calibration is None:
            return expected
        key = ("found", which, self._levels, *found)
        return self._sections.once(key, lambda: self._compare(which, found, expected))

    def _compare(self, which: int, found: list[bytes], expected: Sequence[bytes]) -> list[bytes]:
        one, two = (decode_on_host(self._sections, payloads) for payloads in (found, expected))
        away = np.abs(one - two)
        assert (away <= 1 + np.abs(two) / 128).all(), f"values {which} are off by {away.max()} steps"
        assert (away > 0).mean() <= MOST_APART, f"of values {which}, {(away > 0).mean():.1%} differ from the CPU's"
        return found

    def sizes_of(self, plan: EncodePlan, lengths: np.ndarray) -> Sequence[int]:
        """Also of sections so short that exact coding may be shorter."""
        return level_sizes(lengths, len(plan.header), self._levels)

    def _plan(self, planner: ScalableEncodePlanner, sections: LossySections, group: int) -> ScalableEncodePlan:
        model = sections.model
        plan = planner.plan(
            SectionInPages(
                layers=(0, model.group),
                first_head=0,
                heads=model.heads,
                head_dim=model.dim,
                tokens=model.tokens,
                token_begin=0,
                layer_begin=group * model.group,
                head=0,
                first_position=FIRST_POSITION,
                dtype="bfloat16",
                levels=self._levels,
                calibration=self._copies[group],
                rotation=sections.rotation,
            )
        )
        assert plan is not None, "kernels do not code this shape"
        return plan
