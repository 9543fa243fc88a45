"""What leaves first."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore_s3.tier.eviction import Eviction


def evict_all(policy: Eviction[int]) -> list[int]:
    gone = []
    while (name := policy.evict()) is not None:
        gone.append(name)
    return gone


def test_what_nobody_asked_for_leaves_in_the_order_of_its_coming() -> None:
    policy: Eviction[int] = Eviction(1000)
    for name in range(5):
        policy.add(name, 100)
    assert evict_all(policy) == [0, 1, 2, 3, 4]
    assert policy.bytes == len(policy) == 0


def test_a_scan_of_one_shot_documents_does_not_flush_what_is_used() -> None:
    policy: Eviction[int] = Eviction(1000)
    used = range(5)
    for name in used:
        policy.add(name, 100)
        policy.visit(name, 10.0)
    for name in range(100, 200):
        policy.add(name, 100, now=20.0)
        while policy.bytes > 1000:
            policy.evict()
    assert all(name in policy for name in used)


def test_a_name_that_comes_back_soon_after_its_eviction_stays_longer() -> None:
    policy: Eviction[int] = Eviction(1000)
    policy.add(0, 100)
    assert policy.evict() == 0
    for name in (0, 1, 2, 3):
        policy.add(name, 100)
    assert policy.evict() == 1
    assert 0 in policy


def test_the_pieces_of_one_load_are_one_visit() -> None:
    policy: Eviction[int] = Eviction(1000, one_visit_s=1.0)
    policy.add(0, 100, now=5.0)
    policy.visit(0, 5.1)
    policy.visit(0, 5.9)
    policy.add(1, 100, now=6.0)
    assert policy.evict() == 0


def test_a_busy_entry_is_never_evicted() -> None:
    policy: Eviction[int] = Eviction(1000)
    for name in range(3):
        policy.add(name, 100)
    assert policy.evict(lambda name: name != 1) == 1
    assert policy.evict(lambda name: True) is None
    assert len(policy) == 2


def test_an_entry_that_was_found_at_the_start_is_not_on_trial() -> None:
    policy: Eviction[int] = Eviction(1000)
    policy.add(0, 700, proven=True)
    policy.add(1, 300)
    assert policy.evict() == 1


class EvictionMachine(RuleBasedStateMachine):
    """Whatever happens, the policy knows the same entries and bytes as a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.policy: Eviction[int] = Eviction(500)
        self.sizes: dict[int, int] = {}
        self.now = 0.0

    @rule(name=st.integers(0, 9), size=st.integers(1, 200), proven=st.booleans())
    def add(self, name: int, size: int, proven: bool) -> None:
        self.policy.add(name, size, self.now, proven=proven)
        self.sizes.setdefault(name, size)

    @rule(name=st.integers(0, 9))
    def remove(self, name: int) -> None:
        self.policy.remove(name)
        self.sizes.pop(name, None)

    @rule(name=st.integers(0, 9), pause=st.floats(0, 3))
    def visit(self, name: int, pause: float) -> None:
        self.now += pause
        self.policy.visit(name, self.now)

    @rule(busy=st.sets(st.integers(0, 9)))
    def evict(self, busy: set[int]) -> None:
        victim = self.policy.evict(busy.__contains__)
        assert (victim is None) == (set(self.sizes) <= busy)
        if victim is not None:
            assert victim not in busy
            del self.sizes[victim]

    @invariant()
    def agrees(self) -> None:
        assert self.policy.bytes == sum(self.sizes.values())
        assert {name for name in range(10) if name in self.policy} == set(self.sizes)
        assert len(self.policy) == len(self.sizes)


TestEvictionMachine = EvictionMachine.TestCase
TestEvictionMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(0, 400), max_size=400), st.integers(1, 8))
def test_memory_of_past_names_is_bounded(names: list[int], room: int) -> None:
    policy: Eviction[int] = Eviction(room)
    for name in names:
        policy.add(name, 1)
        while policy.bytes > room:
            policy.evict()
    assert len(policy._ghosts) <= max(16, room)
