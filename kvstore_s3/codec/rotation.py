"""Rotary positions, so that K can be coded with its rotation undone: a rotated K looks like noise to any transform.

Undoing it wrongly, or not at all, costs bits and never correctness: the decoder turns K by the same angles back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.layout import KVLayout

Floats = npt.NDArray[np.float32]

STYLES = ("none", "halves", "pairs")
"""Which numbers of a head make a pair, by id in the bitstream: none, (j, j + P), (2 j, 2 j + 1)."""


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """How K of each layer was rotated: pair j of position p by `p * inverse_frequencies[j]`.

    `inverse_frequencies` is float32 [P], empty for style "none"; `rotated` uint8 [layers], 1 where a layer is rotated.
    """

    style: str
    inverse_frequencies: Floats
    rotated: npt.NDArray[np.uint8]

    @property
    def style_id(self) -> int:
        return STYLES.index(self.style)

    @classmethod
    def none(cls, layers: int) -> Rotation:
        """K as it is."""
        return cls("none", np.empty(0, np.float32), np.zeros(layers, np.uint8))

    @classmethod
    def from_layout(cls, layout: KVLayout) -> Rotation:
        """The rotation that the layout's RoPE parameters describe; "none" for kinds that rotate by other rules.

        Raises `InvalidArgumentError` where a parameter of the kind is missing or impossible.
        """
        rope = layout.rope
        compute = _FREQUENCIES.get(rope["rope_type"])
        if compute is None:
            return cls.none(layout.layers)
        dim = int(layout.head_dim * _number(rope, "partial_rotary_factor", 1.0))
        if not 2 <= dim <= layout.head_dim or dim % 2:
            raise InvalidArgumentError(f"RoPE over {dim} of {layout.head_dim} dimensions; an even number is needed")
        frequencies = compute(rope, dim).astype(np.float32)
        if not np.isfinite(frequencies).all():
            raise InvalidArgumentError(f"these RoPE parameters give no finite frequencies: {dict(rope)}")
        flags = rope.get("no_rope_layers", (1,) * layout.layers)
        if not isinstance(flags, tuple) or len(flags) != layout.layers or any(flag not in (0, 1) for flag in flags):
            raise InvalidArgumentError(f"no_rope_layers is a list of {layout.layers} numbers 0 or 1, not {flags!r}")
        return cls("halves", frequencies, np.array(flags, np.uint8))

    def select(self, layer_begin: int, layer_end: int) -> npt.NDArray[np.uint8]:
        """`rotated` of some layers."""
        return self.rotated[layer_begin:layer_end]

    def tables(self, first_position: int, tokens: int) -> tuple[Floats, Floats]:
        """Cosine and sine, each float32 [tokens, P], computed in float64."""
        return _tables(self.inverse_frequencies.tobytes(), first_position, tokens)


@lru_cache(maxsize=64)
def _tables(frequencies: bytes, first_position: int, tokens: int) -> tuple[Floats, Floats]:
    positions = np.arange(first_position, first_position + tokens, dtype=np.float64)
    angles = positions[:, None] * np.frombuffer(frequencies, np.float32).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


Frequencies = npt.NDArray[np.float64]


def _default(rope: Mapping[str, Any], dim: int) -> Frequencies:
    frequencies: Frequencies = _positive(rope, "rope_theta") ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    return frequencies


def _linear(rope: Mapping[str, Any], dim: int) -> Frequencies:
    return _default(rope, dim) / _positive(rope, "factor")


def _llama3(rope: Mapping[str, Any], dim: int) -> Frequencies:
    """As Llama 3.1's reference code: long waves are stretched, short ones kept, those between blended."""
    frequencies, factor = _default(rope, dim), _positive(rope, "factor")
    low, high = _positive(rope, "low_freq_factor"), _positive(rope, "high_freq_factor")
    if high <= low:
        raise InvalidArgumentError(f"RoPE type llama3: high_freq_factor {high} must be above low_freq_factor {low}")
    turns = _positive(rope, "original_max_position_embeddings") * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    blended: Frequencies = (1 - kept) * frequencies / factor + kept * frequencies
    return blended


def _yarn(rope: Mapping[str, Any], dim: int) -> Frequencies:
    """As B. Peng et al., "YaRN", arXiv:2309.00071, eq. 23 on; its factor of attention scales K and needs no undoing."""
    base, length = _positive(rope, "rope_theta"), _positive(rope, "original_max_position_embeddings")
    if base <= 1:
        raise InvalidArgumentError(f"RoPE type yarn: rope_theta {base} must be above 1")

    def dimension_of(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension_of(_positive(rope, "beta_fast", 32.0))
    high = dimension_of(_positive(rope, "beta_slow", 1.0))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    stretched = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    frequencies = _default(rope, dim)
    blended: Frequencies = stretched * frequencies / _positive(rope, "factor") + (1 - stretched) * frequencies
    return blended


_FREQUENCIES = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}


def _positive(rope: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = _number(rope, name, default)
    if not value > 0:
        raise InvalidArgumentError(f"RoPE type {rope['rope_type']}: {name} must be above 0, not {value}")
    return value


def _number(rope: Mapping[str, Any], name: str, default: float | None) -> float:
    value = rope.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgumentError(f"RoPE type {rope['rope_type']}: {name} must be a number, not {value!r}")
    return float(value)
