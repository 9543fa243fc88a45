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
    def bytes_needed(model: Model, chunks: int) -> int:
        """Device memory: the cache, payloads with room for the worst, and 12 bytes of scratch for each value."""
        return 9 * chunks * model.chunk_bytes + 2**28

    def check(self) -> None:
        """The first and the last payload are the CPU's: byte for byte, or, with a calibration, up to a step in few
        numbers. Raises `AssertionError`.
        """
        for which, levels in self.read_ends():
            expected = self._sections.encode_on_host(which, self._levels)
            if self._sections.calibration is None:
                assert levels == expected, f"values {which} were coded otherwise"
                continue
            found, known = (decode_on_host(self._sections, payloads) for payloads in (levels, expected))
            away = np.abs(found - known)
            assert (away <= 1 + np.abs(known) / 128).all(), f"values {which} are off by {away.max()} steps"
            assert (away > 0).mean() <= MOST_APART, f"of values {which}, {(away > 0).mean():.1%} differ from the CPU's"

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
