"""What the rig does on a device, whatever that is: engines to be tried, and scenes that their tests share."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from connectors.vllm.rig import Rig, RigOptions, Shape, tokens
from connectors.vllm.rig_store import Faults
from connectors.vllm.rig_traffic import Habits, Traffic, check_store

SHAPE = Shape(on_device=True)
BY_LAYER = {"load_mode": "by-layer"}
CASES = {
    "the engine's own prefix cache in front": RigOptions(SHAPE, blocks=24),
    "every prefix from the store": RigOptions(SHAPE, chunk_tokens=64, prefix_caching=False),
    "preemptions": RigOptions(SHAPE, blocks=20, prefix_caching=False),
    "chunks that end within a block": RigOptions(SHAPE, chunk_tokens=48, prefix_caching=False),
    "blocks as long as chunks": RigOptions(SHAPE, chunk_tokens=32, prefix_caching=False),
    "chunks of three blocks": RigOptions(SHAPE, chunk_tokens=96, prefix_caching=False),
    "float32": RigOptions(replace(SHAPE, dtype=torch.float32), chunk_tokens=32, prefix_caching=False),
    "float16": RigOptions(replace(SHAPE, dtype=torch.float16), chunk_tokens=32, prefix_caching=False),
    "fp8": RigOptions(replace(SHAPE, dtype=torch.float8_e4m3fn), chunk_tokens=32, prefix_caching=False),
    "fp8 by layer": RigOptions(replace(SHAPE, dtype=torch.float8_e4m3fn), chunk_tokens=32, blocks=24, extra=BY_LAYER),
    "loads by layer": RigOptions(SHAPE, chunk_tokens=32, blocks=24, extra=BY_LAYER),
    "loads by layer, each prefix": RigOptions(SHAPE, chunk_tokens=32, prefix_caching=False, extra=BY_LAYER),
    "two ranks": RigOptions(SHAPE, chunk_tokens=32, ranks=2, prefix_caching=False),
    "the caller's own process": RigOptions(SHAPE, chunk_tokens=32, blocks=20, processes=False),
}


def settle(rig: Rig) -> None:
    """Until all saves are stored: `Rig.run` ends when their blocks are read."""
    end = time.monotonic() + 60
    while rig.scheduler.connector._scheduler._saves._saves:
        assert time.monotonic() < end
        rig.step()
        time.sleep(0.002)


def meet_only_right_kv(store: str, options: RigOptions, habits: Habits, *, seed: int) -> None:
    """Random traffic, of which something is loaded: on a busy machine all saves may come too late for it."""
    with Rig(store, options) as rig:
        traffic = Traffic(rig, habits, seed=seed)
        traffic.run()
        settle(rig)
        for prompt, salt in traffic.prompts:
            if sum(rig.external.values()):
                break
            rig.ask(prompt, salt=salt)
            rig.run()
        rig.check_nothing_left()
        assert sum(rig.external.values()) > 0, "nothing was loaded: this proves nothing"
    assert check_store(store, rig.formula, traffic.prompts, chunk_tokens=options.chunk_tokens) > 0


def abort_loads(store: str, options: RigOptions, *, rounds: int) -> None:
    """Requests that end while they load, with others that take their blocks."""
    with Rig(store, options, Faults(delay_s=(0.0, 0.02), seed=5)) as rig:
        rig.ask(tokens(400))
        rig.run()
        for number in range(rounds):
            name = rig.ask(tokens(400))
            for _ in range(2 + number % 4):
                rig.step()
            rig.abort(name)
            rig.ask(tokens(300, seed=number), answer=2)
            rig.run()
        rig.check_nothing_left()


ABORTING = RigOptions(SHAPE, chunk_tokens=32, blocks=18, longest=512, prefix_caching=False)
