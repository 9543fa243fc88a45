"""Qualities: the names by which users ask for values, and what each means for writers and readers. Pure.

A writer of a quality writes objects of its `object_profile`; a scalable object holds all three levels, so that one who
asks for "small" and one who asks for "near-lossless" share it (fewer, where the values come from a prefix of fewer). A
reader of a quality reads its `levels`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.section_index import PROFILES

LOSSY_DTYPES = ("bfloat16", "float16", "float32")
"""KV dtypes that a lossy quality can code."""


@dataclass(frozen=True, slots=True)
class Quality:
    """One quality. `accepts` are the object profiles that a reader of it takes; an object of another one is a miss."""

    name: str
    object_profile: str
    levels: int
    accepts: frozenset[str]

    @property
    def lossy(self) -> bool:
        return self.object_profile != "lossless"

    def is_met_by(self, profile: int, levels: int) -> bool:
        """Whether an object of header profile `profile` with `levels` levels is as good as was asked for, or better."""
        name = _PROFILE_NAMES[profile]
        return name in self.accepts and (name != "scalable" or levels >= self.levels)


def _define(name: str, object_profile: str, levels: int) -> tuple[str, Quality]:
    return name, Quality(name, object_profile, levels, frozenset({"lossless", object_profile}))


QUALITIES: Mapping[str, Quality] = MappingProxyType(
    dict(
        (
            _define("lossless", "lossless", 1),
            _define("near-lossless", "scalable", 3),
            _define("balanced", "scalable", 2),
            _define("small", "scalable", 1),
            _define("cachegen", "cachegen", 1),
        )
    )
)
"""Every quality by its name, the best first."""

_BY_LEVELS = {quality.levels: name for name, quality in QUALITIES.items() if quality.object_profile == "scalable"}
_PROFILE_NAMES = {number: name for name, number in PROFILES.items()}


def find_quality(name: str) -> Quality:
    """The quality of that name. Raises `InvalidArgumentError` naming those there are."""
    try:
        return QUALITIES[name]
    except KeyError:
        raise InvalidArgumentError(f"unknown profile {name!r}; use one of {', '.join(QUALITIES)}") from None


def quality_of(profile: int, levels: int) -> str:
    """The quality that `levels` levels of an object of header profile `profile` have."""
    name = _PROFILE_NAMES[profile]
    return _BY_LEVELS[levels] if name == "scalable" else name


def worst_quality(names: Collection[str]) -> str:
    """The worst of some qualities; "lossless" of none."""
    order = list(QUALITIES)
    return order[max((order.index(name) for name in names), default=0)]


def describe_quality(name: str, calibrated: bool | None) -> str:
    """The name as people read it; values known to be coded without a calibration are "balanced (uncalibrated)"."""
    return f"{name} (uncalibrated)" if calibrated is False else name


def check_dtype(quality: Quality, dtype: str) -> None:
    """Raise `InvalidArgumentError` where this quality cannot code KV of `dtype`."""
    if quality.lossy and dtype not in LOSSY_DTYPES:
        raise InvalidArgumentError(
            f"profile {quality.name!r} is lossy, and lossy profiles are for {', '.join(LOSSY_DTYPES)}; this KV is "
            f"{dtype}: use profile 'lossless'"
        )
