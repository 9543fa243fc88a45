"""What the two halves of the NVMe tier tell each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvstore_s3.tier.extents import Extent


@dataclass(frozen=True, slots=True)
class Listing:
    """What is there: extents and when they were last asked for (ns since 1970), and whether O_DIRECT works."""

    found: Mapping[Extent, int]
    generation: int
    direct: bool


@dataclass(frozen=True, slots=True)
class Temporary:
    """A reserved and locked file for `extent`; `file` is its descriptor."""

    extent: Extent
    path: Path
    file: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place for a piece, or by how many bytes the budget is exceeded, and what became of the victims."""

    temporary: Temporary | None
    missing: int
    removed: Sequence[Extent] = ()
    spared: Mapping[Extent, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Committed:
    """A piece got its name; `modified_ns` as in `Listing`."""

    modified_ns: int
    generation: int


@dataclass(frozen=True, slots=True)
class Step:
    """How far a piece came: not even to a place, to a temporary, or to its name."""

    reservation: Reservation
    committed: Committed | None
