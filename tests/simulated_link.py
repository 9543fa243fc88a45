"""A link without a network: reads that share its rate after a delay. Exact, by the clock that it keeps itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from kvstore_s3.transfer.bandwidth import Bandwidth
from kvstore_s3.transfer.window import Limit

MB = 1_000_000


@dataclass(eq=False)
class Flow:
    size: int
    started: float
    flowing_from: float
    left: float


@dataclass
class SimulatedLink:
    """`bytes_per_s` is shared equally by the reads past `delay_s`; each gets `flow_bytes_per_s` at most.

    `jitter` multiplies each read's delay by a number from 1 on, exponentially distributed.
    """

    bytes_per_s: float
    delay_s: float
    flow_bytes_per_s: float = float("inf")
    jitter: float = 0.0
    random: Random = field(default_factory=lambda: Random(0))
    now: float = 0.0
    moved: float = 0.0
    flows: list[Flow] = field(default_factory=list)
    tickets: dict[Flow, Any] = field(default_factory=dict)

    def start(self, size: int) -> Flow:
        delay = self.delay_s * (1 + (self.random.expovariate(1 / self.jitter) if self.jitter else 0.0))
        self.flows.append(Flow(size, self.now, self.now + delay, float(size)))
        return self.flows[-1]

    def finish_next(self) -> Flow:
        """Let time pass until a read ends."""
        while True:
            flowing = [flow for flow in self.flows if flow.flowing_from <= self.now]
            rate = min(self.flow_bytes_per_s, self.bytes_per_s / len(flowing)) if flowing else 0.0
            steps = [flow.flowing_from - self.now for flow in self.flows if flow.flowing_from > self.now]
            steps += [flow.left / rate for flow in flowing]
            step = min(steps)
            self.now += step
            for flow in flowing:
                flow.left -= rate * step
                self.moved += rate * step
            for flow in flowing:
                if flow.left <= 1e-6 * flow.size:
                    self.flows.remove(flow)
                    return flow


def run_window(
    link: SimulatedLink,
    seconds: float,
    size: Callable[[], int],
    limit: Limit,
    bandwidth: Bandwidth,
    *,
    most_wanted: int = 1000,
) -> float:
    """Read for `seconds` by the link's clock, as many at once as `limit` allows; returns bytes per second moved."""
    began, moved = link.now, link.moved
    while link.now < began + seconds:
        while len(link.flows) < min(limit.reads, most_wanted):
            flow = link.start(size())
            link.tickets[flow] = limit.start(len(link.flows))
        flow = link.finish_next()
        in_flight = len(link.flows) + 1
        bandwidth.observe(flow.size, flow.started, link.now, in_flight)
        limit.observe(link.tickets.pop(flow), flow.size, link.now - flow.started, in_flight, link.now)
    return (link.moved - moved) / (link.now - began)
