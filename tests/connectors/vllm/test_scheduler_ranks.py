"""Tensor parallel ranks, each with a store of its own, of which one fails: all use what all of them could load."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

from connectors.vllm.rig import Rig, RigOptions, Shape, tokens  # noqa: E402
from connectors.vllm.rig_store import Faults, damage_object, objects_of_chunk  # noqa: E402
from connectors.vllm.rig_traffic import Habits, Traffic, check_store, keys_of, namespace_of  # noqa: E402

QUICK = {"BREAKER_PAUSE_S": "0.05", "CONNECT_TIMEOUT_S": "0.2"}
BY_LAYER = {"load_mode": "by-layer"}
MODES = {"between steps": {}, "by layer": BY_LAYER}
PROMPT = tokens(200)
"""Four chunks of 48 tokens, six blocks of 32."""


def options_of(ranks: int, mode: str = "between steps", **others: object) -> RigOptions:
    extra = {"lookup_deadline_s": 0.3, "load_deadline_s": 1.0, **MODES[mode]}
    return RigOptions(Shape(heads=4), ranks=ranks, settings=QUICK, extra=extra, **others)  # type: ignore[arg-type]


FAILING = {
    "damaged": {"damaged": 0.15},
    "out now and then": {"unavailable": 0.1, "busy": 0.1},
    "slower": {"delay_s": (0.0, 0.04)},
    "all of it": {"delay_s": (0.0, 0.02), "damaged": 0.05, "vanished": 0.05, "unavailable": 0.03, "busy": 0.03},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAILING)
def test_one_rank_whose_store_is(name: str, mode: str):
    store = f"faulty://rank-{name}-{mode}".replace(" ", "-")
    failing = Faults(seed=3, **FAILING[name])  # type: ignore[arg-type]
    options = options_of(2, mode, blocks=32, prefix_caching=mode == "by layer")
    with Rig(store, options) as rig:
        earlier = Traffic(rig, Habits(requests=15), seed=1)
        earlier.run()
    with Rig(store, options, rank_faults=[Faults(), failing]) as rig:
        traffic = Traffic(rig, Habits(requests=55), seed=len(name))
        traffic.prompts += earlier.prompts  # to be asked again, and grown
        traffic.run()
        rig.check_nothing_left()
        assert len(rig.finished) + sum(traffic.aborted_in.values()) == 40
        assert rig.external, "nothing was loaded: this proves nothing"
    failing.clear()
    assert check_store(store, rig.formula, traffic.prompts, chunk_tokens=48) > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("slower", [0, 1])
def test_ranks_use_the_prefix_that_all_of_them_have(slower: int, mode: str):
    """Of four chunks, rank 0 cannot read the last one, nor rank 1 the third: two are used, three blocks of 32."""
    store = f"faulty://smallest-{slower}-{mode}".replace(" ", "-")
    with Rig(store, options_of(2, mode)) as rig:
        rig.ask(PROMPT)
        rig.run()
        rig.check_nothing_left()
    keys = keys_of(namespace_of(rig.options.shape, 48), PROMPT)
    for rank, chunk in ((0, 3), (1, 2)):
        tiles = objects_of_chunk(store.removeprefix("faulty://"), keys[chunk])
        assert len(tiles) == 2
        damage_object(store.removeprefix("faulty://"), tiles[rank])
    faults = [Faults(), Faults()]
    faults[slower].delay_s = (0.1, 0.1)
    with Rig(store, options_of(2, mode), rank_faults=faults) as rig:
        name = rig.ask(PROMPT)
        rig.run()
        assert rig.external == {name: 192}, "so many were promised"
        assert rig.loaded_tokens(name) == 96
        rig.check_nothing_left()
    with Rig(store, options_of(2, mode)) as rig:
        name = rig.ask(PROMPT)
        rig.run()
        assert rig.loaded_tokens(name) == 192, "mended by whoever computed it"


def test_a_rank_whose_store_is_out_makes_all_compute():
    with Rig("faulty://one-out", options_of(2, prefix_caching=False)) as rig:
        rig.ask(PROMPT)
        rig.run()
    failing = Faults(out=True)
    with Rig("faulty://one-out", options_of(2, prefix_caching=False), rank_faults=[Faults(), failing]) as rig:
        names = [rig.ask(tokens(200, seed=seed)) for seed in (0, 0, 1, 1)]
        rig.run()
        assert [rig.loaded_tokens(name) for name in names] == [0] * 4
        rig.check_nothing_left()


@pytest.mark.parametrize(("writer", "reader"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_what_one_number_of_ranks_saved_another_loads(writer: int, reader: int):
    store = f"faulty://partitions-{writer}-{reader}"
    for ranks, expected in ((writer, 0), (reader, 192)):
        with Rig(store, options_of(ranks)) as rig:
            name = rig.ask(PROMPT)
            rig.run()
            assert rig.loaded_tokens(name) == expected
            rig.check_nothing_left()
        assert rig.faults.chunks_created == (0 if expected else 4 * writer), "what is there is not saved again"


def test_a_prompt_that_grows_under_changing_numbers_of_ranks_is_loaded_whole():
    """Its chunks lie in the store as one object or two; readers join them."""
    prompt, loaded = tokens(100), []
    for turn, ranks in enumerate((1, 2, 1, 2)):
        with Rig("faulty://mixture", options_of(ranks)) as rig:
            name = rig.ask(prompt)
            rig.run()
            loaded.append(rig.loaded_tokens(name))
            rig.check_nothing_left()
        prompt = prompt + tokens(100, seed=turn + 1)
    assert loaded == [0, 96, 192, 288]
    assert check_store("faulty://mixture", rig.formula, [(prompt, None)], chunk_tokens=48) == 384
