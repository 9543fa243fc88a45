"""Hit rates of the tiers' eviction policy beside FIFO, LRU, SIEVE, W-TinyLFU and the offline optimum, on three traces.

    python benchmarks/tier_policy.py [--requests 60000]

A trace is a sequence of chunk reads, each with a size; a miss is inserted, as the tiers do. `zipf`: chunks of documents
whose popularity is Zipf's. `scan`: the same, and half of the bytes belong to long documents that are read once.
`turns`: conversations with a shared beginning that grow with each turn, many at a time. Capacity is a share of all
distinct bytes. The optimum evicts what is asked for again last (Belady), which is exact for equal sizes and close to it
for these. "ours, tail first" visits a prompt's chunks from its end, so that of equal ones the later chunk goes first.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import accumulate, chain, islice
from typing import Any, Protocol

from record import record

from kvstore_s3.tier.eviction import Eviction

CAPACITIES = (0.01, 0.05, 0.1, 0.25)
SEEDS = (1, 2, 3)
Request = tuple[int, int]
"""Name of a chunk and its size in KiB."""


class Policy(Protocol):
    """A cache of a fixed size; `ask` answers whether the chunk was there, and inserts it where it was not."""

    def ask(self, name: int, size: int) -> bool: ...


class Lru:
    """Least recently used; with `touch=False`, first in, first out."""

    def __init__(self, capacity: int, *, touch: bool = True) -> None:
        self.capacity, self.touch, self.used = capacity, touch, 0
        self.kept: OrderedDict[int, int] = OrderedDict()

    def ask(self, name: int, size: int) -> bool:
        if name in self.kept:
            if self.touch:
                self.kept.move_to_end(name)
            return True
        self.kept[name] = size
        self.used += size
        while self.used > self.capacity:
            self.used -= self.kept.popitem(last=False)[1]
        return False


class Sieve:
    """Zhang et al., "SIEVE is simpler than LRU" (NSDI 2024), with sizes."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used = capacity, 0
        self.kept: dict[int, list[int]] = {}
        self.older: deque[int] = deque()  # behind the hand, the oldest first
        self.newer: deque[int] = deque()  # the hand has passed them, or they are new

    def ask(self, name: int, size: int) -> bool:
        if name in self.kept:
            self.kept[name][1] = 1
            return True
        while self.kept and self.used + size > self.capacity:
            self.evict()
        self.kept[name] = [size, 0]
        self.newer.append(name)
        self.used += size
        return False

    def evict(self) -> None:
        while True:
            if not self.older:
                self.older, self.newer = self.newer, self.older
            name = self.older.popleft()
            if not self.kept[name][1]:
                self.used -= self.kept.pop(name)[0]
                return
            self.kept[name][1] = 0
            self.newer.append(name)


class TinyLfu:
    """W-TinyLFU (Einziger, Friedman, Manes, 2017): window 1 %, exact counts that are halved, segmented LRU behind."""

    def __init__(self, capacity: int) -> None:
        self.window = Lru(max(capacity // 100, 1))
        self.capacity, self.protected_capacity = capacity - capacity // 100, capacity * 4 // 5
        self.probation: OrderedDict[int, int] = OrderedDict()
        self.protected: OrderedDict[int, int] = OrderedDict()
        self.bytes = {"probation": 0, "protected": 0}
        self.counts: Counter[int] = Counter()
        self.asked, self.halve_after = 0, 0

    def ask(self, name: int, size: int) -> bool:
        self.count(name)
        if name in self.protected:
            self.protected.move_to_end(name)
            return True
        if name in self.probation:
            self.promote(name)
            return True
        if name in self.window.kept:
            self.window.kept.move_to_end(name)
            return True
        self.window.kept[name] = size
        self.window.used += size
        while self.window.used > self.window.capacity:
            candidate, bytes_ = self.window.kept.popitem(last=False)
            self.window.used -= bytes_
            self.admit(candidate, bytes_)
        return False

    def count(self, name: int) -> None:
        self.counts[name] += 1
        self.asked += 1
        entries = len(self.probation) + len(self.protected) + len(self.window.kept)
        if self.asked >= 10 * max(entries, 100):
            self.asked //= 2
            self.counts = Counter({each: number // 2 for each, number in self.counts.items() if number > 1})

    def promote(self, name: int) -> None:
        size = self.probation.pop(name)
        self.bytes["probation"] -= size
        self.protected[name] = size
        self.bytes["protected"] += size
        while self.bytes["protected"] > self.protected_capacity:
            back, bytes_ = self.protected.popitem(last=False)
            self.bytes["protected"] -= bytes_
            self.probation[back] = bytes_
            self.bytes["probation"] += bytes_

    def admit(self, name: int, size: int) -> None:
        while sum(self.bytes.values()) + size > self.capacity:
            segment = "probation" if self.probation else "protected"
            kept = self.probation if self.probation else self.protected
            if not kept:
                return
            victim = next(iter(kept))
            if self.counts[name] <= self.counts[victim]:
                return
            self.bytes[segment] -= kept.pop(victim)
        self.probation[name] = size
        self.bytes["probation"] += size


class Ours:
    """The policy of the tiers."""

    def __init__(self, capacity: int, **named: float) -> None:
        self.capacity = capacity
        self.policy: Eviction[int] = Eviction(capacity, one_visit_s=0.0, **named)

    def ask(self, name: int, size: int) -> bool:
        if name in self.policy:
            self.policy.visit(name, 0.0)
            return True
        while self.policy.bytes + size > self.capacity and self.policy.evict() is not None:
            pass
        self.policy.add(name, size)
        return False


POLICIES: dict[str, Callable[[int], Policy]] = {
    "FIFO": lambda capacity: Lru(capacity, touch=False),
    "LRU": Lru,
    "SIEVE": Sieve,
    "W-TinyLFU": TinyLfu,
    "ours (S3-FIFO)": Ours,
}


def zipf(chance: random.Random, documents: int = 4000, exponent: float = 0.9) -> Iterator[list[Request]]:
    """Documents of 1 to 16 chunks; each request reads the chunks of one, or of its beginning."""
    lengths = [chance.randrange(1, 17) for _ in range(documents)]
    weights = list(accumulate(1 / rank**exponent for rank in range(1, documents + 1)))
    while True:
        document = bisect_left(weights, chance.random() * weights[-1])
        read = chance.randrange(1, lengths[document] + 1) if chance.random() < 0.3 else lengths[document]
        yield [chunk(100 * document + place) for place in range(read)]


def scan(chance: random.Random) -> Iterator[list[Request]]:
    """As many chunks of long documents that are never read again as of the others."""
    once = 10**9
    owed = 0
    for request in zipf(chance):
        yield request
        owed += len(request)
        if owed >= 64:
            yield [chunk(once + place) for place in range(owed)]
            once, owed = once + owed, 0


def turns(chance: random.Random, at_once: int = 300) -> Iterator[list[Request]]:
    """Conversations: a shared system prompt (Zipf), then two to three chunks more with each turn; some are short."""
    conversations: list[list[int]] = []
    names = iter(range(10**6, 10**9))
    prompts = list(accumulate(1 / rank for rank in range(1, 51)))
    while True:
        if len(conversations) < at_once:
            prompt = bisect_left(prompts, chance.random() * prompts[-1])
            conversations.append([100 * prompt + place for place in range(2 + prompt % 6)])
        # Who spoke last is likelier to speak again soon: think times are far from equal.
        place = len(conversations) - 1 - int(len(conversations) * chance.random() ** 2)
        conversation = conversations.pop(place)
        conversation += islice(names, chance.randrange(1, 5))
        yield [chunk(name) for name in conversation]
        if chance.random() < 0.85 and len(conversation) < 64:
            conversations.append(conversation)


def chunk(name: int) -> Request:
    """Sizes differ by two, as encoded chunks of one model do."""
    return name, 2048 + name * 2654435761 % 2048


TRACES: dict[str, Callable[[random.Random], Iterator[list[Request]]]] = {"zipf": zipf, "scan": scan, "turns": turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=60_000)
    arguments = parser.parse_args()
    rows = [row for name in TRACES for row in measure(name, arguments.requests)]
    for row in rows:
        rates = "  ".join(f"{name} {rate:5.1%}" for name, rate in row["byte_hit_rate"].items())
        print(f"{row['trace']:6} {row['capacity']:5.0%}  {rates}")
    record("tier_policy", {"requests": arguments.requests, "seeds": len(SEEDS), "rows": rows})


def measure(trace: str, requests: int) -> Iterator[dict[str, Any]]:
    """Share of the bytes asked for that were kept: means over the seeds, after a first quarter to warm up."""
    made = [prompts_of(trace, requests, seed) for seed in SEEDS]
    for share in CAPACITIES:
        rates: dict[str, list[float]] = {}
        for prompts in made:
            asked = list(chain.from_iterable(prompts))
            capacity = int(share * sum(dict(asked).values()))
            for name, policy in POLICIES.items():
                rates.setdefault(name, []).append(hit_rate(policy(capacity).ask, asked))
            reverse = list(chain.from_iterable(reversed(prompt) for prompt in prompts))
            rates.setdefault("ours, tail first", []).append(hit_rate(Ours(capacity).ask, reverse))
            rates.setdefault("optimum", []).append(optimum(asked, capacity))
        means = {name: round(statistics.mean(each), 4) for name, each in rates.items()}
        yield {"trace": trace, "capacity": share, "byte_hit_rate": means}


def prompts_of(trace: str, requests: int, seed: int) -> list[list[Request]]:
    """Prompts with `requests` chunks together, or a few more."""
    prompts, count = [], 0
    for prompt in TRACES[trace](random.Random(seed)):
        prompts.append(prompt)
        count += len(prompt)
        if count >= requests:
            break
    return prompts


def hit_rate(ask: Callable[[int, int], bool], asked: list[Request]) -> float:
    hit = total = 0
    for number, (name, size) in enumerate(asked):
        found = ask(name, size)
        if number >= len(asked) // 4:
            total += size
            hit += size * found
    return hit / total


def optimum(asked: list[Request], capacity: int) -> float:
    """Belady: evict what is asked for again last, and keep nothing that is not."""
    again = [len(asked)] * len(asked)
    seen: dict[int, int] = {}
    for place in range(len(asked) - 1, -1, -1):
        again[place] = seen.get(asked[place][0], len(asked))
        seen[asked[place][0]] = place
    kept: dict[int, int] = {}
    order: list[tuple[int, int]] = []
    used, place = 0, -1

    def ask(name: int, size: int) -> bool:
        nonlocal used, place
        place += 1
        found = name in kept
        if not found:
            used += size
        kept[name] = again[place]
        heapq.heappush(order, (-again[place], name))
        while used > capacity:
            when, victim = heapq.heappop(order)
            if kept.get(victim) == -when:
                del kept[victim]
                used -= chunk(victim)[1]
        return found

    return hit_rate(ask, asked)


if __name__ == "__main__":
    main()
