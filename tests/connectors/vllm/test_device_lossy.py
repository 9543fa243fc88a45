"""Lossy profiles saved out of an emulated GPU's blocks under vLLM's scheduler: what the CPU would have stored."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

import torch  # noqa: E402
from connectors.vllm.rig import Rig, RigOptions, Shape, tokens  # noqa: E402
from connectors.vllm.rig_model import prefixes_of  # noqa: E402
from connectors.vllm.rig_traffic import keys_of, namespace_of  # noqa: E402
from connectors.vllm.test_scheduler_device import settle  # noqa: E402
from device.counting import CountingLibrary  # noqa: E402
from device.emulated import build  # noqa: E402

from kvstore_s3 import Settings, connect  # noqa: E402
from kvstore_s3.calibrations import Calibrations  # noqa: E402
from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET, DeviceDecoder  # noqa: E402

CHUNK = 64
SETTINGS = Settings(profile="near-lossless", miss_lifetime_s=60.0)


@pytest.fixture
def library(pytestconfig: pytest.Config) -> CountingLibrary:
    return CountingLibrary(build(Path(pytestconfig.cache.mkdir("kernels"))), emulated=True)


@pytest.fixture
def decoder(library: CountingLibrary) -> Iterator[DeviceDecoder]:
    with DeviceDecoder(library, torch.device("cpu"), 4 * SMALLEST_BUDGET) as decoder:
        yield decoder


@pytest.fixture
def producer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that loads nothing: every value in its blocks is the formula's."""
    make = Rig._make_config

    def make_producer(rig: Rig) -> Any:
        config = make(rig)
        config.kv_transfer_config.kv_role = "kv_producer"
        return config

    monkeypatch.setattr(Rig, "_make_config", make_producer)


def learn_calibration(rig: Rig) -> None:
    """Wait until the worker knows which calibration there is, which it has asked for at its start."""
    calibrations = rig.ranks[0].connector._worker._store.kv.calibrations
    end = time.monotonic() + 60
    while not calibrations.asked:
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.usefixtures("producer")
def test_lossy_values_out_of_blocks_are_those_that_the_cpu_would_have_stored(
    decoder: DeviceDecoder, library: CountingLibrary
):
    shape, prompts = Shape(on_device=True), [tokens(300, seed=seed) for seed in range(3)]
    options = RigOptions(
        shape, chunk_tokens=CHUNK, blocks=48, step_tokens=128, decoder=decoder, extra={"profile": "near-lossless"}
    )
    with Rig("faulty://device-lossy", options) as rig:
        learn_calibration(rig)
        for number, prompt in enumerate(prompts):
            for _ in range(3):  # on a busy machine a prompt may have been computed before it was known what to save
                if library.lossy_calls == 4 * number:
                    rig.ask(prompt)
                    rig.run()
                    settle(rig)
        rig.check_nothing_left()
    assert library.lossy_calls == 12
    assert not library.heads
    namespace = namespace_of(shape, CHUNK)
    with (
        connect("memory://device-lossy", namespace, SETTINGS) as saved,
        connect("memory://device-lossy-expected", namespace, SETTINGS) as expected,
    ):
        for prompt in prompts:
            keys = keys_of(namespace, prompt, None)
            expected.save_keys(keys, rig.formula.values(prefixes_of(prompt, None, 0)[1:])[:, :, : CHUNK * len(keys)])
            found = saved.load(saved.lookup_keys(keys))
            assert found.shape[2] == CHUNK * len(keys)
            assert torch.equal(found, expected.load(expected.lookup_keys(keys)))


@pytest.mark.usefixtures("producer")
def test_a_save_before_the_store_has_said_which_calibration_there_is_is_coded_by_the_cpu(
    decoder: DeviceDecoder, library: CountingLibrary, monkeypatch: pytest.MonkeyPatch
):
    answer = threading.Event()

    async def answer_late(_: Calibrations) -> None:
        await asyncio.to_thread(answer.wait, 60)

    monkeypatch.setattr(Calibrations, "_read_current", answer_late)
    shape, prompt = Shape(on_device=True), tokens(300)
    options = RigOptions(shape, chunk_tokens=CHUNK, blocks=48, decoder=decoder, extra={"profile": "near-lossless"})
    with Rig("faulty://device-lossy-late", options) as rig:
        rig.ask(prompt)
        rig.run()
        answer.set()
        settle(rig)
        rig.check_nothing_left()
    assert not library.lossy_calls
    namespace = namespace_of(shape, CHUNK)
    with connect("memory://device-lossy-late", namespace, SETTINGS) as saved:
        assert saved.lookup_keys(keys_of(namespace, prompt, None)).tokens == 4 * CHUNK
