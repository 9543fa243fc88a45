"""Who is next on a link that several loads share: urgencies for `Window.slot`, smaller first. Pure.

Equal shares make every load late: of two equal loads both end when the second could have ended at the latest. So the
link serves one after the other, and the order is by a due time, in seconds of the monotonic clock:

    since the engine waits for it + PATIENCE * seconds that the rest of its load takes on this link

- An engine that waits is helped soonest by the load with the least left: shortest remaining time first has the smallest
  mean waiting time of all orders.
- An engine that still computes earlier layers does not wait yet: its next group counts from when it must be asked for
  to be there in time. Until then the link is free for those who wait.
- A due time is fixed but for what the load itself still has to read. Whatever arrives more than PATIENCE times that
  later comes after it, however small: nobody starves.

As these are points in time, urgencies that were given at different moments can be compared, and a queue need not be
sorted anew as time passes.
"""

from __future__ import annotations

from collections.abc import Iterable

PATIENCE = 4.0
"""How many times its own duration a load lets shorter ones go first. 0 is first come, first served."""

ASSUMED_BYTES_PER_S = 1e9
"""The link until it was measured; only the proportion of sizes to waiting depends on it."""


def urgency(
    *, arrived_at: float, needed_at: float, group_bytes: int, remaining_bytes: int, bandwidth: float | None
) -> float:
    """The due time of a read, in seconds of the monotonic clock: of two reads the smaller one goes first.

    The read belongs to a layer group of which `group_bytes` are unread, in a load that came at `arrived_at` and has
    `remaining_bytes` to read, this group included. The engine needs the group at `needed_at`; a time that is over means
    that it waits. `bandwidth` is the link's, in bytes/s (None: not known yet).
    """
    rate = max(bandwidth or ASSUMED_BYTES_PER_S, 1.0)
    waits_from = max(arrived_at, needed_at - group_bytes / rate)
    return waits_from + PATIENCE * remaining_bytes / rate


def bytes_ahead(mine: float, others: Iterable[tuple[float, int]]) -> int:
    """Bytes that the link moves before a load of urgency `mine`; `others` are (urgency, remaining bytes) of each.

    Divided by the bandwidth, it is what a planner adds to the latency of the load.
    """
    return sum(remaining for theirs, remaining in others if theirs <= mine)
