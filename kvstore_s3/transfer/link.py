"""Who is next on a link that several loads share: urgencies for `Window.slot`, smaller first. Pure.

Equal shares make every load late: of two equal loads both end when the second could have ended at the latest. So the
link serves one after the other, and the order is by a due time, in seconds of the monotonic clock:

    when the engine needs what is read + PATIENCE * seconds that the rest of its load takes on this link

- An engine that waits is helped soonest by the load with the least left: shortest remaining time first has the smallest
  mean waiting time of all orders. A load that others delayed counts from when it should have been served, so that what
  it suffered is not forgotten at its next layer group.
- An engine that still computes earlier layers does not wait yet: the link is free for those who do.
- A due time is fixed but for what the load itself still has to read. Whatever is needed more than PATIENCE times that
  later comes after it, however small: nobody starves.

As these are points in time, urgencies that were given at different moments can be compared, and a queue need not be
sorted anew as time passes. docs/planner.md compares the order with others.
"""

from __future__ import annotations

from collections.abc import Iterable

PATIENCE = 8.0
"""How many times its own duration a load lets shorter ones go first. 0: in the order of needing; far more: starving."""

ASSUMED_BYTES_PER_S = 1e9
"""The link until it was measured; only the proportion of sizes to waiting depends on it."""


def urgency(*, needed_at: float, remaining_bytes: int, bandwidth: float | None) -> float:
    """The due time of a read, in seconds of the monotonic clock: of two reads the smaller one goes first.

    `needed_at` is when the engine would need what is read if reading took no time: when the load began, and where the
    engine computes layer group by layer group while later ones are read, the computing of the groups before it later.
    The load has `remaining_bytes` to read, this read included. `bandwidth` is the link's in bytes/s (None: not known).
    """
    return needed_at + PATIENCE * remaining_bytes / max(bandwidth or ASSUMED_BYTES_PER_S, 1.0)


def bytes_ahead(mine: float, others: Iterable[tuple[float, int]]) -> int:
    """Bytes that the link moves before a load of urgency `mine`; `others` are (urgency, remaining bytes) of each.

    Divided by the bandwidth, it is what a planner adds to the latency of the load.
    """
    return sum(remaining for theirs, remaining in others if theirs <= mine)
