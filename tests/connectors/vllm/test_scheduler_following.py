"""Requests whose prompt another engine computes now: it writes late, in any order, stalls, stops, or is damaged."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

from connectors.vllm.rig import Rig, RigOptions, Shape, tokens  # noqa: E402
from connectors.vllm.rig_model import Formula, prefixes_of  # noqa: E402
from connectors.vllm.rig_store import Faults, damage_object, objects_of_chunk  # noqa: E402
from connectors.vllm.rig_traffic import check_store, keys_of, namespace_of  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402

from kvstore_s3 import connect  # noqa: E402
from kvstore_s3.runtime import SyncKVStore  # noqa: E402

PROMPT = tokens(200)
"""Four chunks of 48 tokens, six blocks of 32."""
FOLLOW = {"do_remote_prefill": True}
WANTED = {"do_remote_decode": True}


def options_of(*, ranks: int = 1, stall_s: float = 0.3, **extra: object) -> RigOptions:
    return RigOptions(prefix_caching=False, ranks=ranks, extra={"follow_stall_s": stall_s, **extra})


class Writer:
    """Stores chunks of `PROMPT` as another engine would, when told to."""

    def __init__(self, name: str, opened: SyncKVStore) -> None:
        self._name = name
        self._store = opened
        self._formula = Formula(Shape())
        self._keys = keys_of(namespace_of(Shape(), 48), PROMPT)

    def store(self, chunk: int) -> None:
        begin, end = 48 * chunk, 48 * (chunk + 1)
        kv = self._formula.values(prefixes_of(PROMPT[:end], None, 0)[begin + 1 :])
        self._store.save_keys(self._keys[chunk : chunk + 1], kv, first_token=begin)

    def damage(self, chunk: int) -> None:
        for key in objects_of_chunk(self._name, self._keys[chunk]):
            damage_object(self._name, key)


@contextmanager
def writer_to(name: str) -> Iterator[Writer]:
    with connect(f"memory://{name}", namespace_of(Shape(), 48)) as store:
        yield Writer(name, store)


def follow(rig: Rig, writer: Writer, plan: dict[int, tuple[int, ...]]) -> str:
    """Ask, and store chunks at steps after it, as `plan` says. Returns the request."""
    name, first = rig.ask(PROMPT, transfer=FOLLOW), rig.steps

    def is_done() -> bool:
        for chunk in plan.get(rig.steps - first, ()):
            writer.store(chunk)
        return not rig.scheduler.has_requests()

    rig.run(until=is_done)
    rig.check_nothing_left()
    return name


ARRIVALS = {
    "one after the other": {3: (0,), 6: (1,), 9: (2,), 15: (3,)},
    "all at once, late": {10: (0, 1, 2, 3)},
    "before they are asked for": {0: (0, 1, 2, 3)},
    "the last one first": {2: (3,), 6: (2,), 10: (1,), 14: (0,)},
}


@pytest.mark.parametrize("name", ARRIVALS)
def test_chunks_that_arrive(name: str):
    store = f"follow-{name}".replace(" ", "-").replace(",", "")
    with writer_to(store) as writer, Rig(f"faulty://{store}", options_of(stall_s=2.0)) as rig:
        request = follow(rig, writer, ARRIVALS[name])
        assert rig.loaded_tokens(request) == 192


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_writer_that_stops_leaves_the_rest_to_be_computed_and_saved(chunks: int, ranks: int):
    store = f"follow-stops-{chunks}-{ranks}"
    with writer_to(store) as writer, Rig(f"faulty://{store}", options_of(ranks=ranks)) as rig:
        request = follow(rig, writer, {2 * chunk: (chunk,) for chunk in range(chunks)})
        assert rig.loaded_tokens(request) == 48 * chunks // 32 * 32
    assert check_store(f"faulty://{store}", rig.formula, [(PROMPT, None)], chunk_tokens=48) == 192


def test_what_comes_after_the_stall_is_left_where_it_is():
    options = replace(options_of(stall_s=0.1), step_tokens=32)
    with writer_to("follow-stalls") as writer, Rig("faulty://follow-stalls", options) as rig:
        writer.store(0)
        name = rig.ask(PROMPT, transfer=FOLLOW)
        rig.run(until=rig.until(name, RequestStatus.RUNNING))
        assert name in rig.asked
        for chunk in (1, 2, 3):
            writer.store(chunk)
            rig.step()
        rig.run()
        assert rig.loaded_tokens(name) == 32
        rig.check_nothing_left()


def test_a_damaged_chunk_ends_following():
    with writer_to("follow-damaged") as writer, Rig("faulty://follow-damaged", options_of()) as rig:
        for chunk in range(4):
            writer.store(chunk)
        writer.damage(2)
        request = follow(rig, writer, {})
        assert rig.loaded_tokens(request) == 96


def test_a_rank_whose_store_fails_while_it_follows_makes_all_compute_what_it_lacks():
    failing = Faults(delay_s=(0.0, 0.02))
    options = options_of(ranks=2)
    with writer_to("follow-rank") as writer, Rig("faulty://follow-rank", options, None, [Faults(), failing]) as rig:
        name, first = rig.ask(PROMPT, transfer=FOLLOW), rig.steps

        def is_done() -> bool:
            if rig.steps - first in (1, 2):
                writer.store(rig.steps - first - 1)
            if rig.steps - first == 20:
                failing.out = True
                writer.store(2)
                writer.store(3)
            return not rig.scheduler.has_requests()

        rig.run(until=is_done)
        rig.check_nothing_left()
        assert rig.loaded_tokens(name) == 96
        assert rig.external == {name: 192}


def test_an_abort_while_following_gives_the_blocks_back_at_once():
    with writer_to("follow-abort") as writer, Rig("faulty://follow-abort", options_of(stall_s=30.0)) as rig:
        for number in range(4):
            name = rig.ask(PROMPT, transfer=FOLLOW)
            rig.run(until=rig.until(name, RequestStatus.WAITING_FOR_REMOTE_KVS))
            for _ in range(number):
                rig.step()
            if number == 2:
                writer.store(0)
            rig.abort(name)
            rig.run(limit_s=20.0)
            rig.check_nothing_left()


def test_new_weights_end_following():
    """What still comes is of the old ones."""
    with writer_to("follow-reset") as writer, Rig("faulty://follow-reset", options_of(stall_s=60.0)) as rig:
        writer.store(0)
        name = rig.ask(PROMPT, transfer=FOLLOW)
        rig.run(until=rig.until(name, RequestStatus.WAITING_FOR_REMOTE_KVS))
        for _ in range(5):
            rig.step()
        rig.change_weights(preempt=False)
        for chunk in (1, 2, 3):
            writer.store(chunk)
        rig.run(limit_s=30.0)
        assert rig.loaded_tokens(name) == 0
        rig.check_nothing_left()


@pytest.mark.parametrize(("mode", "ranks"), [("async", (2, 1)), ("by-layer", (1, 2))])
def test_two_engines_of_which_one_prefills_for_the_other(mode: str, ranks: tuple[int, int]):
    """Random prompts, most of them asked of both at once; some prefills are dropped in the middle."""
    chance, store = random.Random(5), f"faulty://follow-engines-{mode}"
    prompts = [tokens(chance.randrange(60, 400), seed=number) for number in range(24)]
    prefiller = RigOptions(prefix_caching=False, step_tokens=64, ranks=ranks[0])
    with Rig(store, prefiller) as prefill:  # the partition of its ranks is known from here on
        prefill.ask(tokens(60))
        prefill.run()
    with (
        Rig(store, prefiller, Faults(delay_s=(0.0, 0.01))) as prefill,
        Rig(store, options_of(ranks=ranks[1], stall_s=0.4, load_mode=mode)) as decode,
    ):
        dropped = set()
        for number, prompt in enumerate(prompts):
            wanted = prefill.ask(prompt, answer=1, transfer=WANTED)
            decode.ask(prompt, transfer=FOLLOW)
            if number % 4 == 3:  # the same again, and one that is not told
                decode.ask(prompt, transfer=FOLLOW)
                decode.ask(prompt)
            while len(decode.asked) > 3:
                for rig in (prefill, decode):
                    rig.step()
                if number % 6 == 5 and len(prompt) > 200 and wanted not in dropped:
                    dropped.add(wanted)
                    prefill.abort(wanted)
        while prefill.scheduler.has_requests() or decode.scheduler.has_requests():
            for rig in (prefill, decode):
                rig.step()
        prefill.check_nothing_left()
        decode.check_nothing_left()
        assert dropped
        loaded = [asked.loaded for asked in decode.finished.values()]
        assert sum(number > 0 for number in loaded) >= 20
    assert check_store(store, decode.formula, [(prompt, None) for prompt in prompts], chunk_tokens=48) > 0
