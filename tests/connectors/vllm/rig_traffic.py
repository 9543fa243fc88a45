"""Random traffic for the rig: conversations that grow, shared prefixes, salts, bursts, aborts at any moment."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from connectors.vllm.rig import Rig, model_of
from connectors.vllm.rig_model import Formula, Shape, prefixes_of

from kvstore_s3 import Namespace, connect
from kvstore_s3.config import Settings
from kvstore_s3.hashing import as_token_array, chunk_keys, root_key


@dataclass(frozen=True)
class Habits:
    """What the clients do. Shares are of 1."""

    requests: int = 90
    longest: int = 400
    answer: int = 6
    at_once: int = 12
    """Requests that are under way at once, at most."""
    repeats: float = 0.25
    """Share of requests that ask exactly what was asked before."""
    grows: float = 0.4
    """Share that go on from an earlier prompt and its answer."""
    aborts: float = 0.2
    salts: tuple[str | None, ...] = (None, None, None, "tenant")


class Traffic:
    """Asks, steps and aborts until all is done. `prompts` is what was asked, with salts."""

    def __init__(self, rig: Rig, habits: Habits, *, seed: int) -> None:
        self._rig = rig
        self._habits = habits
        self._chance = random.Random(seed)
        self.prompts: list[tuple[list[int], str | None]] = []
        self.aborted_in: dict[str, int] = {}

    def run(self, *, each_step: Callable[[int], None] = lambda step: None, limit_s: float = 200.0) -> None:
        rig, habits = self._rig, self._habits

        def is_done() -> bool:
            each_step(rig.steps)
            self._ask_some()
            if rig.asked and self._throw(habits.aborts / 4):
                self._abort_one()
            return len(self.prompts) >= habits.requests and not rig.scheduler.has_requests()

        rig.run(until=is_done, limit_s=limit_s, during=self._abort_in_step)

    def _ask_some(self) -> None:
        """Often none, sometimes one, now and then a burst of the same."""
        room = min(self._habits.at_once - len(self._rig.asked), self._habits.requests - len(self.prompts))
        if room <= 0 or not self._throw(0.6):
            return
        prompt, salt = self._pick_prompt(), self._chance.choice(self._habits.salts)
        for _ in range(self._chance.choice((1, 1, 1, min(room, 4)))):
            self._rig.ask(prompt, answer=self._chance.randrange(1, self._habits.answer + 1), salt=salt)
            self.prompts.append((prompt, salt))

    def _pick_prompt(self) -> list[int]:
        chance, longest = self._chance, self._habits.longest
        kind = chance.random()
        old = list(chance.choice(self.prompts)[0]) if self.prompts else []
        if kind < self._habits.repeats and old:
            return old
        begin = old if kind < self._habits.repeats + self._habits.grows else old[: chance.choice((0, len(old) // 2))]
        fresh = [chance.randrange(1000) for _ in range(chance.randrange(1, longest // 2))]
        return (begin + fresh)[-longest:] if len(begin) + len(fresh) > longest else begin + fresh

    def _abort_in_step(self) -> None:
        if self._rig.asked and self._throw(self._habits.aborts / 8):
            self._abort_one()

    def _abort_one(self) -> None:
        name = self._chance.choice(sorted(self._rig.asked))
        status = str(self._rig.status(name))
        self.aborted_in[status] = self.aborted_in.get(status, 0) + 1
        self._rig.abort(name)

    def _throw(self, share: float) -> bool:
        return self._chance.random() < share


def namespace_of(shape: Shape, chunk_tokens: int) -> Namespace:
    """Where engines of this shape keep their KV."""
    variant = "vllm fp8 KV of bfloat16" if shape.is_fp8 else None
    model = model_of(replace(shape, block_tokens=32))
    return Namespace.from_model(model, dtype=shape.dtype, chunk_tokens=chunk_tokens, variant=variant)


def keys_of(
    namespace: Namespace, prompt: Sequence[int], salt: str | None = None, *, epoch: bytes = b""
) -> Sequence[bytes]:
    """Keys of a prompt's whole chunks, as the connector makes them."""
    root, extra = root_key(namespace.digest, salt), {0: epoch} if epoch else None
    return chunk_keys(root, as_token_array(list(prompt)), namespace.chunk_tokens, extra_keys=extra)


def check_store(
    url: str,
    formula: Formula,
    prompts: Iterable[tuple[list[int], str | None]],
    *,
    chunk_tokens: int,
    epoch: bytes = b"",
    weights: int = 0,
) -> int:
    """Load all that the store has of these prompts and compare every bit. Returns how many tokens that were.

    `epoch` is what the keys hold since the engine was given these `weights`.
    """
    namespace = namespace_of(formula.shape, chunk_tokens)
    found = 0
    with connect(url.replace("faulty://", "memory://"), namespace, Settings(miss_lifetime_s=60.0)) as store:
        for prompt, salt in {(tuple(prompt), salt) for prompt, salt in prompts}:
            kv = store.load(store.lookup_keys(keys_of(namespace, prompt, salt, epoch=epoch)))
            length = kv.shape[2]
            found += length
            expected = formula.values(prefixes_of(prompt[:length], salt, weights)[1:]) if length else kv
            assert torch.equal(kv, expected), f"the store holds wrong KV for a prompt of {len(prompt)} tokens"
    return found
