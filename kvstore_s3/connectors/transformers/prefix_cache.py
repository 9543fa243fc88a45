"""PrefixCache: one model, one store. Loads the longest stored prefix, computes the rest, saves what is new."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch

from kvstore_s3.config import Settings, load_settings
from kvstore_s3.connectors.pretrained import load_model
from kvstore_s3.connectors.transformers.admission import check_model, check_weights
from kvstore_s3.connectors.transformers.canonical import build_cache, common_gpu, read_cache, view_cache
from kvstore_s3.connectors.transformers.prompt import as_prompt, check_arguments
from kvstore_s3.device_load import Device
from kvstore_s3.device_save import DeviceKV
from kvstore_s3.errors import InvalidArgumentError, KVStoreError
from kvstore_s3.hub import find_model_directory
from kvstore_s3.namespace import Namespace
from kvstore_s3.runtime import connect
from kvstore_s3.store import Hit, Saved

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from kvstore_s3.runtime import SyncKVStore

log = logging.getLogger("kvstore_s3")

STEP_TOKENS = 1024
"""Tokens of one step of a long prefill. A multiple of 512, the block of keys in torch's CPU attention: with it, the
steps' KV came out bit for bit that of one step (docs/transformers.md); and attention's mask stays small."""

TAIL_BLOCK = 32
"""The computed end of a prompt is rounded up to a multiple of this. Attention kernels work on blocks of rows, and a
last block of 1 to 3 rows goes through another kernel, which rounds differently: that could tip a near tie."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """What one prompt took from the store and gave to it."""

    prompt_tokens: int
    loaded_tokens: int
    """Tokens whose KV came from the store and was used."""
    chunks_saved: int
    bytes_saved: int
    load_seconds: float
    """Lookup, read, decode and copy to the model's devices."""
    save_seconds: float
    quality: str = "lossless"
    """Quality of what was loaded, the worst of it: "lossless", "balanced", "balanced (uncalibrated)" ..."""

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.loaded_tokens


@dataclass(frozen=True, slots=True)
class _Found:
    """What a prompt finds in the store. `stored` tokens, of which `cache` may use fewer; `answered`: the store did."""

    cache: DynamicCache
    stored: int
    answered: bool
    seconds: float
    quality: str
    described: str
    """`quality` as people read it."""


_NOTHING = Saved(0, 0, 0)


class PrefixCache:
    """A causal language model whose prompts' KV is kept in a store.

    `store` comes from `connect`. Its namespace names the model's weights: giving the weights that the namespace was
    made for is up to the caller; what can be seen from here (shapes, dtype, adapters, quantisation) is checked.
    Raises `UnsupportedModelError` for a model whose cache cannot be cut, `InvalidArgumentError` for one that is not
    the namespace's. Not for several threads at once.

    `device` is where KV is decoded and coded, as for `KVStore.load`: None, the GPU that has all of the model's layers,
    or else the host.
    """

    def __init__(self, model: PreTrainedModel, store: SyncKVStore, *, device: Device | None = None) -> None:
        if inspect.iscoroutinefunction(getattr(store, "lookup", None)):
            raise InvalidArgumentError("PrefixCache needs the blocking store that `connect` gives, not a KVStore")
        self.model = model
        self.store = store
        self.last: Reuse | None = None
        """What the last `generate` or `prefill` reused."""
        self._devices = check_model(model, store.namespace)
        self._place = common_gpu(self._devices) if device is None else device
        self._step_arguments: dict[str, Any] = {"logits_to_keep": 1} if _can_skip_logits(model) else {}
        self._reported: set[str] = set()

    @classmethod
    @contextmanager
    def open(
        cls, model: str, url: str, settings: Settings | None = None, *, dtype: str | None = None
    ) -> Iterator[Self]:
        """Load a model directory or hub id and connect to `url`, under the namespace of just these weights."""
        settings = settings or load_settings()
        directory = find_model_directory(model)  # once: what a hub id means may change between two answers
        namespace = Namespace.from_model(directory, dtype=dtype, chunk_tokens=settings.chunk_tokens)
        with connect(url, namespace, settings) as store:
            yield cls(load_model(str(directory), namespace.layout.dtype), store)

    def generate(self, input_ids: Any, *, salt: str | bytes | None = None, **arguments: Any) -> Any:
        """`model.generate` for one prompt, with the same arguments and the same answer.

        `input_ids`: a list, numpy array or tensor of [n] or [1, n]. Only prompts stored with the same `salt` are seen.
        Saves the prompt's whole chunks, not the answer's. A store that fails is logged, once for each kind of failure,
        and the prompt is computed. Arguments that make the prompt's KV depend on more than its tokens (padding,
        `inputs_embeds`, beams ...) raise `InvalidArgumentError`.
        """
        prompt = as_prompt(input_ids)
        check_arguments(self.model, prompt, arguments)
        check_weights(self.model, self.store.namespace)
        found = self._load(prompt, salt, keep=_leave_tail)
        used = found.cache.get_seq_length()
        ids = prompt.to(self.model.device)
        arguments |= {"attention_mask": torch.ones_like(ids), "past_key_values": found.cache}
        answer = self.model.generate(ids, **arguments)
        started = time.perf_counter()
        end = self._whole(prompt.shape[1]) if found.answered else 0
        saved = self._try_save(prompt, found.cache, found.stored, end, salt, found.quality)
        save_seconds = time.perf_counter() - started
        self.last = Reuse(
            prompt.shape[1], used, saved.chunks_new, saved.bytes, found.seconds, save_seconds, found.described
        )
        return answer

    def prefill(
        self, input_ids: Any, *, salt: str | bytes | None = None, progress: Callable[[int], None] | None = None
    ) -> tuple[DynamicCache, Reuse]:
        """Return the KV cache of all of `input_ids`, and what was reused; saves whole chunks as they get there.

        Computes in steps of `STEP_TOKENS`, without logits, so that memory stays bounded. `progress` is called with the
        number of tokens done. A store that fails is handled as in `generate`.
        """
        prompt = as_prompt(input_ids)
        check_weights(self.model, self.store.namespace)
        found = self._load(prompt, salt, keep=min)
        used = found.cache.get_seq_length()
        save = self._try_save if found.answered else _save_nothing
        saved, save_seconds = self._extend(prompt, found.cache, found.stored, salt, save, progress, found.quality)
        self.last = Reuse(
            prompt.shape[1], used, saved.chunks_new, saved.bytes, found.seconds, save_seconds, found.described
        )
        return found.cache, self.last

    def warm(
        self, token_ids: Any, *, salt: str | bytes | None = None, progress: Callable[[int], None] | None = None
    ) -> Saved:
        """Store the KV of all whole chunks of `token_ids`; nothing is computed where all are there.

        Saves after each step, so that an interruption keeps what was done and a second call goes on from there.
        `progress` is called with the number of tokens done. A store that fails raises `StoreError`.
        """
        prompt = as_prompt(token_ids)
        check_weights(self.model, self.store.namespace)
        prompt = prompt[:, : self._whole(prompt.shape[1])]
        tokens, size = prompt.shape[1], self.store.namespace.chunk_tokens
        hit = self.store.lookup(prompt[0], salt=salt, thorough=True) if tokens else None
        if hit is None or hit.tokens == tokens:
            _report(progress, tokens)
            return Saved(0, tokens // size, 0, self.store.kv.quality.name)
        cache = build_cache(self.model.config, self._load_hit(hit), self._devices)
        stored = cache.get_seq_length()
        _report(progress, stored)
        saved, _ = self._extend(prompt, cache, stored, salt, self._save, progress, hit.cut(stored).quality)
        return replace(saved, chunks_present=stored // size + saved.chunks_present)

    def _load(self, prompt: torch.Tensor, salt: str | bytes | None, *, keep: Callable[[int, int], int]) -> _Found:
        """Look up and load the stored prefix, and cut it to `keep(tokens stored, tokens of the prompt)`."""
        started = time.perf_counter()
        kv, answered, quality, described = None, True, "lossless", "lossless"
        try:
            hit = self.store.lookup(prompt[0], salt=salt)
            kv = self._load_hit(hit)
            used = hit.cut(0 if kv is None else kv.shape[2])
            quality, described = used.quality, used.describe_quality()
        except InvalidArgumentError:  # the caller's mistake, such as a salt of the wrong type
            raise
        except KVStoreError as error:
            self._note("load from", error)
            answered = False
        else:
            self._reported.discard("load from")
        stored = 0 if kv is None else kv.shape[2]
        if kv is not None:
            kv = kv[:, :, : keep(stored, prompt.shape[1])]
        cache = build_cache(self.model.config, kv, self._devices)
        return _Found(cache, stored, answered, time.perf_counter() - started, quality, described)

    def _load_hit(self, hit: Hit) -> torch.Tensor | None:
        """A hit's KV where the model wants it: on its GPU where it has just one, decoded there."""
        return self.store.load(hit, device=self._place) if hit else None

    def _try_save(
        self, prompt: torch.Tensor, cache: DynamicCache, begin: int, end: int, salt: str | bytes | None, quality: str
    ) -> Saved:
        try:
            saved = self._save(prompt, cache, begin, end, salt, quality)
        except KVStoreError as error:
            self._note("save to", error)
            return _NOTHING
        self._reported.discard("save to")
        return saved

    def _save(
        self, prompt: torch.Tensor, cache: DynamicCache, begin: int, end: int, salt: str | bytes | None, quality: str
    ) -> Saved:
        """`quality` is that of what was loaded in front."""
        if end <= begin:
            return _NOTHING
        kv = self._read(cache, begin, end)
        return self.store.save(prompt[0, :end], kv, salt=salt, first_token=begin, prefix_quality=quality)

    def _read(self, cache: DynamicCache, begin: int, end: int) -> torch.Tensor | DeviceKV:
        """The tokens' KV: where it is, or a copy on the host."""
        encoder = self.store.kv.encoder_for(self._place)
        if encoder is not None and (memory := view_cache(cache, begin, end)).alike:
            return DeviceKV.of_layers(memory, encoder)
        return read_cache(cache, begin, end)

    @torch.no_grad()
    def _step(self, ids: torch.Tensor, cache: DynamicCache) -> None:
        self.model(input_ids=ids.to(self.model.device), past_key_values=cache, use_cache=True, **self._step_arguments)

    def _extend(
        self,
        prompt: torch.Tensor,
        cache: DynamicCache,
        stored: int,
        salt: str | bytes | None,
        save: Callable[[torch.Tensor, DynamicCache, int, int, str | bytes | None, str], Saved],
        progress: Callable[[int], None] | None,
        quality: str,
    ) -> tuple[Saved, float]:
        """Compute what `cache` lacks of `prompt`, saving each step's whole chunks; also the seconds of saving."""
        total, seconds = _NOTHING, 0.0
        for begin in range(cache.get_seq_length(), prompt.shape[1], STEP_TOKENS):
            self._step(prompt[:, begin : begin + STEP_TOKENS], cache)
            done = min(begin + STEP_TOKENS, prompt.shape[1])
            started = time.perf_counter()
            total = _add(total, save(prompt, cache, stored, self._whole(done), salt, quality))
            seconds += time.perf_counter() - started
            stored = max(stored, self._whole(done))
            _report(progress, done)
        return total, seconds

    def _whole(self, tokens: int) -> int:
        """Of `tokens`, those in whole chunks."""
        return tokens - tokens % self.store.namespace.chunk_tokens

    def _note(self, what: str, error: KVStoreError) -> None:
        """Say once that the store fails, until it has answered again."""
        level = logging.DEBUG if what in self._reported else logging.WARNING
        self._reported.add(what)
        log.log(level, "could not %s the KV store; prompts are computed instead: %s", what, error)


def _leave_tail(stored: int, tokens: int) -> int:
    """How many stored tokens of a prompt to use, so that at least `TAIL_BLOCK`, in whole blocks, are computed."""
    tail = max(TAIL_BLOCK, -(-(tokens - stored) // TAIL_BLOCK) * TAIL_BLOCK)
    return max(0, tokens - tail)


def _can_skip_logits(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _save_nothing(*_: object) -> Saved:
    """In place of saving, where the store did not even answer a lookup: one wait for it is enough."""
    return _NOTHING


def _report(progress: Callable[[int], None] | None, tokens: int) -> None:
    if progress is not None:
        progress(tokens)


def _add(one: Saved, other: Saved) -> Saved:
    return Saved(
        one.chunks_new + other.chunks_new,
        one.chunks_present + other.chunks_present,
        one.bytes + other.bytes,
        one.quality if other is _NOTHING else other.quality,
        one.calibrated if other.calibrated is None or one.calibrated is False else other.calibrated,
    )
