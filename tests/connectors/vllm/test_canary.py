"""The rig must see each kind of wrong KV, or its silence proves nothing. And blocks that a load must not touch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

import torch  # noqa: E402
from connectors.vllm.rig import Rig, RigOptions, tokens  # noqa: E402
from connectors.vllm.rig_store import Faults  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402

from kvstore_s3.connectors.vllm.paged import PagedCache  # noqa: E402

PROMPT = tokens(400)
OPTIONS = RigOptions(prefix_caching=False)


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    with Rig("faulty://canary", OPTIONS) as rig:
        rig.ask(PROMPT)
        rig.run()


def break_writes(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    """Every write of a load goes through `change` first, which may return None: then it is left out."""
    write = PagedCache.write

    def broken(self: PagedCache, layer_begin: int, kv: torch.Tensor, block_ids: Sequence[int]) -> None:
        changed = change(layer_begin, kv, list(block_ids))  # type: ignore[operator]
        if changed is not None:
            write(self, *changed)

    monkeypatch.setattr(PagedCache, "write", broken)


BREAKAGES = {
    "left out": (lambda layer, kv, blocks: None, "computed from wrong KV"),
    "one bit": (lambda layer, kv, blocks: (layer, flip_last_bit(kv), blocks), "computed from wrong KV"),
    "blocks swapped": (lambda layer, kv, blocks: (layer, kv, blocks[::-1]), "computed from wrong KV"),
    "another's block": (lambda layer, kv, blocks: (layer, kv, [*blocks[:-1], 60]), "were written by a load"),
}


def flip_last_bit(kv: torch.Tensor) -> torch.Tensor:
    changed = kv.clone()
    changed.view(torch.int16)[-1, -1, -1, -1, -1] ^= 1
    return changed


@pytest.mark.parametrize("name", BREAKAGES)
def test_the_rig_sees_a_write_that_is(name: str, monkeypatch: pytest.MonkeyPatch):
    change, message = BREAKAGES[name]
    break_writes(monkeypatch, change)
    with Rig("faulty://canary", OPTIONS) as rig:
        rig.ask(PROMPT)
        with pytest.raises(AssertionError, match=message):
            rig.run()


def test_the_rig_sees_a_write_after_the_end_of_a_load():
    with Rig("faulty://canary", OPTIONS) as rig:
        name = rig.ask(PROMPT)
        rig.run(until=lambda: rig.status(name) == RequestStatus.RUNNING)
        (table,) = rig.scheduler.kv_cache_manager.get_block_ids(name)
        rig.abort(name)
        rig.ranks[0].pages.tensor[1, table[0], 0, 0, 0] += 1
        with pytest.raises(AssertionError, match=rf"blocks \[{table[0]}\] were written"):
            rig.step()


def test_the_rig_sees_a_load_that_is_never_reported(monkeypatch: pytest.MonkeyPatch):
    with Rig("faulty://canary", OPTIONS) as rig:
        worker = rig.ranks[0].connector
        take = worker.get_transfer_results
        monkeypatch.setattr(worker, "get_transfer_results", lambda finished: hide_loads(take(finished)))
        rig.ask(PROMPT)
        with pytest.raises(AssertionError, match=r"stuck: .*WAITING_FOR_REMOTE_KVS"):
            rig.run(limit_s=1)


def hide_loads(results: object) -> object:
    results.finished_recving = None  # type: ignore[attr-defined]
    return results


def test_blocks_of_a_load_that_was_aborted_are_not_handed_out_before_its_last_write():
    """Hardly any room: what comes next needs the very blocks that the load may still write."""
    options = RigOptions(prefix_caching=False, blocks=18, longest=512)
    with Rig("faulty://canary", options, Faults(delay_s=(0.0, 0.06), seed=3)) as rig:
        for round_number in range(12):
            name = rig.ask(PROMPT)
            rig.run(until=rig.until(name, RequestStatus.WAITING_FOR_REMOTE_KVS))
            next_one = rig.ask(tokens(300, seed=round_number), answer=2)
            for _ in range(round_number % 4):
                rig.step()
            rig.abort(name)
            rig.run(until=lambda next_one=next_one: next_one in rig.finished)
        rig.run()
        rig.check_nothing_left()
