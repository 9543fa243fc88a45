"""The rig on an emulated GPU: its kernels decode into pages of its packing, and encode out of them."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

import torch  # noqa: E402
from connectors.vllm.rig import Rig, RigOptions, tokens  # noqa: E402
from connectors.vllm.rig_device import ABORTING, CASES, SHAPE, abort_loads, meet_only_right_kv, settle  # noqa: E402
from connectors.vllm.rig_traffic import Habits, check_store  # noqa: E402
from device.emulated import build  # noqa: E402

from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET, DeviceDecoder  # noqa: E402
from kvstore_s3.codec.device.library import Library, Pages  # noqa: E402
from kvstore_s3.errors import DeviceError  # noqa: E402


class WatchedLibrary(Library):
    """Counts the streams that kernels were given; fails instead once it is told to. Reads and encodes when it may."""

    jobs = encoded = 0
    broken = False

    def __init__(self, path: Path) -> None:
        super().__init__(path, emulated=True)
        self.may_read, self.may_encode = threading.Event(), threading.Event()
        self.may_read.set()
        self.may_encode.set()

    def lossless_encode_scratch(self, components: int, tokens: int) -> int:
        if threading.current_thread().name.startswith("kvstore-s3-device-encode"):  # nothing is being read yet
            assert self.may_read.wait(60)
        return super().lossless_encode_scratch(components, tokens)

    def lossless_encode(self, jobs: int, count: int, pages: Pages, lengths: int, stream: int) -> None:
        assert self.may_encode.wait(60)
        if self.broken:
            raise DeviceError("kvs_lossless_encode failed with CUDA error 700")
        self.encoded += count
        super().lossless_encode(jobs, count, pages, lengths, stream)

    def lossless_decode(self, jobs: int, count: int, pages: Pages, faults: int, stream: int) -> None:
        if self.broken:
            raise DeviceError("kvs_lossless_decode failed with CUDA error 700")
        self.jobs += count
        super().lossless_decode(jobs, count, pages, faults, stream)


@pytest.fixture(scope="module")
def emulation(pytestconfig: pytest.Config) -> Path:
    return build(Path(pytestconfig.cache.mkdir("kernels")))


@pytest.fixture
def library(emulation: Path) -> WatchedLibrary:
    return WatchedLibrary(emulation)


@pytest.fixture
def decoder(library: WatchedLibrary) -> Iterator[DeviceDecoder]:
    with DeviceDecoder(library, torch.device("cpu"), SMALLEST_BUDGET) as decoder:
        yield decoder


SHORT = Habits(requests=40)


@pytest.mark.parametrize("name", CASES)
def test_random_traffic_meets_only_right_kv_on_a_device(name: str, decoder: DeviceDecoder, library: WatchedLibrary):
    options = replace(CASES[name], decoder=decoder)
    store = "faulty://device-" + re.sub(r"[^a-z]", "", name)
    meet_only_right_kv(store, options, SHORT, seed=len(name))
    assert bool(library.jobs) == bool(library.encoded) == (options.shape.dtype == torch.bfloat16)


def test_loads_and_aborts_leave_blocks_of_others_alone_on_a_device(decoder: DeviceDecoder):
    abort_loads("faulty://device-aborts", replace(ABORTING, decoder=decoder), rounds=6)


def test_a_device_that_fails_ends_in_computing(decoder: DeviceDecoder, library: WatchedLibrary):
    options = RigOptions(SHAPE, chunk_tokens=32, prefix_caching=False, decoder=decoder)
    with Rig("faulty://device-broken", options) as rig:
        rig.ask(tokens(200))
        rig.run()
        settle(rig)
        library.broken = True
        name = rig.ask(tokens(200))
        rig.run()
        assert rig.loaded_tokens(name) == 0
        library.broken = False
        settle(rig)
        name = rig.ask(tokens(200))
        rig.run()
        assert rig.loaded_tokens(name) == 192
        rig.check_nothing_left()
        assert rig.counts["kvstore_loads_failed"] == 1


def test_a_device_that_cannot_encode_leaves_that_to_the_cpu(decoder: DeviceDecoder, library: WatchedLibrary):
    library.broken = True
    options = RigOptions(SHAPE, chunk_tokens=32, decoder=decoder)
    with Rig("faulty://device-encode-broken", options) as rig:
        rig.ask(tokens(200))
        rig.run()
        rig.check_nothing_left()
    found = check_store("faulty://device-encode-broken", rig.formula, [(tokens(200), None)], chunk_tokens=32)
    assert found == 192
    assert library.encoded == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_of_an_ended_request_are_held_until_they_were_read(
    ranks: int, decoder: DeviceDecoder, library: WatchedLibrary
):
    library.may_encode.clear()
    options = RigOptions(SHAPE, chunk_tokens=32, ranks=ranks, decoder=decoder)
    with Rig(f"faulty://device-held-{ranks}", options) as rig:
        name = rig.ask(tokens(200), answer=2)
        rig.run(until=lambda: name in rig.finished)
        for _ in range(4):
            rig.step()
        assert rig.scheduler.has_requests(), "nobody would ask again whether they were read"
        assert rig.pool.get_num_free_blocks() == rig.free_blocks - 7
        library.may_encode.set()
        rig.run()
        rig.check_nothing_left()


def test_a_slow_store_does_not_hold_blocks(decoder: DeviceDecoder, library: WatchedLibrary):
    library.may_read.clear()
    with Rig("faulty://device-slow", RigOptions(SHAPE, chunk_tokens=32, decoder=decoder)) as rig:
        name = rig.ask(tokens(200), answer=2)
        rig.run(until=lambda: name in rig.finished)
        rig.faults.delay_s = (2.0, 2.0)  # for each of a save's requests
        library.may_read.set()
        rig.run()
        assert rig.pool.get_num_free_blocks() == rig.free_blocks
        assert not rig.counts.get("kvstore_saves"), "it was over before its blocks were free"
        rig.faults.clear()


def test_what_a_save_has_not_read_of_a_preempted_request_is_not_saved(decoder: DeviceDecoder, library: WatchedLibrary):
    library.may_read.clear()
    options = RigOptions(SHAPE, chunk_tokens=32, blocks=20, prefix_caching=False, decoder=decoder)
    prompts = [tokens(200, seed=seed) for seed in range(2)]
    with Rig("faulty://device-preempted", options) as rig:
        requests = [rig.asked[rig.ask(prompt, answer=200)].request for prompt in prompts]
        rig.run(until=lambda: any(request.num_preemptions for request in requests))
        library.may_read.set()
        rig.run()
        rig.check_nothing_left()
        assert rig.counts["kvstore_saves_shed"] > 0
    assert check_store("faulty://device-preempted", rig.formula, [(p, None) for p in prompts], chunk_tokens=32) > 0


def test_a_reset_is_refused_as_long_as_blocks_are_held(decoder: DeviceDecoder, library: WatchedLibrary):
    library.may_encode.clear()
    with Rig("faulty://device-reset", RigOptions(SHAPE, chunk_tokens=32, decoder=decoder)) as rig:
        name = rig.ask(tokens(200), answer=2)
        rig.run(until=lambda: name in rig.finished)
        rig.step()
        assert not rig.change_weights()
        library.may_encode.set()
        rig.run()
        assert rig.change_weights()
        name = rig.ask(tokens(200), answer=2)
        rig.run()
        rig.check_nothing_left()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("answer", [1, 8])
def test_in_the_callers_process_nothing_is_held_after_the_last_answer(ranks: int, answer: int, decoder: DeviceDecoder):
    """Such an engine takes no step then, so that whoever wants a reset or sleep would be refused for good."""
    options = RigOptions(SHAPE, chunk_tokens=32, ranks=ranks, prefix_caching=False, processes=False, decoder=decoder)
    with Rig(f"faulty://device-in-caller-{ranks}-{answer}", options) as rig:
        rig.faults.delay_s = (0.2, 0.2)  # saves take longer than answers
        name = rig.ask(tokens(200), answer=answer)
        rig.run(until=lambda: name in rig.finished)
        assert rig.pool.get_num_free_blocks() == rig.free_blocks
        assert rig.scheduler.connector._scheduler._saves._saves, "the step waited for the store"
        assert rig.scheduler.reset_prefix_cache(reset_running_requests=True)
        rig.faults.clear()
    found = check_store(
        f"faulty://device-in-caller-{ranks}-{answer}", rig.formula, [(tokens(200), None)], chunk_tokens=32
    )
    assert found == 192, "what was read was saved"


def test_in_the_callers_process_an_abort_leaves_nothing_held(decoder: DeviceDecoder):
    options = RigOptions(SHAPE, chunk_tokens=32, step_tokens=64, processes=False, decoder=decoder)
    with Rig("faulty://device-in-caller-aborted", options) as rig:
        name = rig.ask(tokens(400))
        rig.run(until=lambda: rig.scheduler.requests[name].num_computed_tokens >= 128)
        rig.abort(name)
        assert rig.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)


@pytest.mark.parametrize("reset", [False, True])
def test_blocks_are_held_for_a_request_that_is_preempted_and_resumed_in_one_step(
    reset: bool, decoder: DeviceDecoder, library: WatchedLibrary, monkeypatch: pytest.MonkeyPatch
):
    """A reset of the engine's own cache preempts between steps; one that may not load goes on in the next."""
    make = Rig._make_config

    def make_producer(rig: Rig) -> Any:
        config = make(rig)
        config.kv_transfer_config.kv_role = "kv_producer"
        return config

    monkeypatch.setattr(Rig, "_make_config", make_producer)
    options = RigOptions(
        SHAPE, chunk_tokens=32, blocks=12, step_tokens=192, prefix_caching=False, watched=False, decoder=decoder
    )
    store, prompt = f"faulty://device-resumed-{reset}", tokens(192, seed=2)
    with Rig(store, options) as rig:
        first, name = rig.ask(tokens(100, seed=1), answer=1), rig.ask(prompt, answer=2)
        rig.run(until=lambda: first in rig.finished)
        settle(rig)
        library.may_read.clear()
        if reset:
            assert rig.scheduler.reset_prefix_cache(reset_running_requests=True)
        rig.run(until=lambda: name in rig.finished)
        rig.step()
        held = rig.scheduler.connector._scheduler._held
        unread = rig.ranks[0].connector._worker._read_later._reading
        assert {request_id for request_id, _ in unread.values()} <= set(held), "blocks are free, and still to be read"
        library.may_read.set()
        rig.run()
    check_store(store, rig.formula, [(prompt, None)], chunk_tokens=32)
