"""The protocol: KL, top-1 agreement and perplexity after a stored context, against the run with its exact KV."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from quality.corpus import CHUNK, NEXT, batches

Values = torch.Tensor
"""KV of windows, bfloat16 [windows, layers, 2, tokens, kv heads, head dim]."""


@dataclass(frozen=True, slots=True)
class Coded:
    """What a method makes of one chunk: its size by purpose, and what its decoder needs."""

    bits: Mapping[str, float]
    data: Any


class Method(Protocol):
    """One peer at one setting.

    `curve` names the method whose settings draw one curve. `timed`: it does all the work of a codec, so that its speed
    means something; false where code lengths are computed and nothing is coded.
    """

    curve: str
    setting: str
    timed: bool

    def encode(self, chunk: torch.Tensor, first_position: int) -> Coded:
        """Code bfloat16 [layers, 2, tokens, kv heads, head dim]."""

    def decode(self, coded: Coded, first_position: int) -> torch.Tensor:
        """The chunk again, as far as the method keeps it; bfloat16."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a model makes of restored KV."""

    kl: float
    """Mean KL divergence from the run with exact KV, nats x 1000."""
    top1: float
    """Per cent of tokens whose most probable one is the same."""
    perplexity: float
    """Change of the perplexity on the true next tokens, per cent."""


@dataclass(frozen=True, slots=True)
class Point:
    """One method at one setting, measured. Bits are per value, everything included."""

    curve: str
    setting: str
    bits: float
    judged: Judgement
    parts: Mapping[str, float] = field(default_factory=dict)
    encode_gb_s: float | None = None
    decode_gb_s: float | None = None
    note: str = ""

    @property
    def kl(self) -> float:
        return self.judged.kl


class Judge:
    """Holds windows, the exact KV of their contexts, and what the model says after it.

    `windows` int64 [windows, context + NEXT + 1]. The model computes in float32, so that the KV alone differs; the
    exact KV is what it computes, rounded to bfloat16, as an engine would hand it over.
    """

    def __init__(self, model: Any, windows: torch.Tensor) -> None:
        self.model = model
        self.windows = windows
        self.context = windows.shape[1] - NEXT - 1
        self.kv = kv_of(model, windows[:, : self.context])
        self._exact = [self._continue(part, kv) for part, kv in zip(batches(windows), batches(self.kv), strict=True)]
        self._losses = torch.cat([self._loss(part, exact) for part, exact in self._parts()])

    def judge(self, kv: Values) -> Judgement:
        kl, same, losses = 0.0, 0.0, []
        for (part, exact), values in zip(self._parts(), batches(kv), strict=True):
            found = self._continue(part, values)
            kl += float((exact.exp() * (exact - found)).sum())
            same += float((exact.argmax(-1) == found.argmax(-1)).sum())
            losses.append(self._loss(part, found))
        tokens = len(self.windows) * NEXT
        change = (torch.cat(losses).mean() - self._losses.mean()).exp().item() - 1
        return Judgement(1e3 * kl / tokens, 100 * same / tokens, 100 * change)

    @property
    def perplexity(self) -> float:
        return self._losses.mean().exp().item()

    def _parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from zip(batches(self.windows), self._exact, strict=True)

    @torch.no_grad()
    def _continue(self, windows: torch.Tensor, kv: Values) -> torch.Tensor:
        """Log probabilities after `kv`, float32 [windows, NEXT, vocabulary]."""
        ids = windows[:, self.context : -1].to(self.model.device)
        logits = self.model(input_ids=ids, past_key_values=cache_of(self.model, kv), use_cache=True).logits
        return logits.float().log_softmax(-1).cpu()

    def _loss(self, windows: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        return -found.gather(-1, windows[:, self.context + 1 :, None])[..., 0]


@torch.no_grad()
def kv_of(model: Any, ids: torch.Tensor) -> Values:
    parts = []
    for part in batches(ids):
        cache = model(input_ids=part.to(model.device), use_cache=True).past_key_values
        layers = [torch.stack([layer.keys, layer.values], 1) for layer in cache.layers]
        parts.append(torch.stack(layers, 1).transpose(3, 4).to("cpu", torch.bfloat16))
    return torch.cat(parts).contiguous()


def cache_of(model: Any, kv: Values) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for layer, part in enumerate(kv.to(model.device, model.dtype).unbind(1)):
        keys, values = part.transpose(2, 3).unbind(1)
        cache.update(keys.contiguous(), values.contiguous(), layer)
    return cache


def measure(method: Method, judge: Judge, *, note: str = "") -> Point:
    """Code every chunk of every window, judge what comes back; speeds are of bfloat16, per core (thread's CPU time)."""
    bits: dict[str, float] = {}
    restored = torch.empty_like(judge.kv)
    encode_s, decode_s = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if method.timed else threads)
    for window, out in zip(judge.kv, restored, strict=True):
        for first in range(0, judge.context, CHUNK):
            chunk = window[:, :, first : first + CHUNK]
            begin = time.thread_time()
            coded = method.encode(chunk, first)
            middle = time.thread_time()
            out[:, :, first : first + CHUNK] = method.decode(coded, first)
            decode_s.append(time.thread_time() - middle)
            encode_s.append(middle - begin)
            for name, size in coded.bits.items():
                bits[name] = bits.get(name, 0.0) + size
    torch.set_num_threads(threads)
    parts = {name: size / restored.numel() for name, size in bits.items()}
    size_gb = 2 * chunk.numel() / 1e9
    return Point(
        method.curve,
        method.setting,
        sum(parts.values()),
        judge.judge(restored),
        parts,
        size_gb / _typical(encode_s) if method.timed else None,
        size_gb / _typical(decode_s) if method.timed else None,
        note,
    )


def _typical(seconds: list[float]) -> float:
    """The lower quartile: other load and first calls count little."""
    return sorted(seconds)[len(seconds) // 4]
