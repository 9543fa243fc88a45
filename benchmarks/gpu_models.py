"""Models of random weights whose first token a benchmark waits for: transformers' Llama, or a plain one in torch.

Both compute in bfloat16 where their weights lie. The plain one is for machines whose Python has no transformers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch.nn import functional

from kvstore_s3 import KVLayout
from kvstore_s3.device_load import Device
from kvstore_s3.device_save import LayersMemory
from kvstore_s3.runtime import SyncKVStore

THETA = 5e5
TAIL = 32
"""Tokens that a hit computes at least, as the transformers connector does: the first token comes out of them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a Llama."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int
    chunk_tokens: int = 256
    deviation: float = 0.02
    """Of the weights."""

    @property
    def layout(self) -> KVLayout:
        rope = {"rope_type": "default", "rope_theta": THETA}
        return KVLayout(self.layers, self.kv_heads, self.dim, "bfloat16", rope=rope)

    @property
    def token_bytes(self) -> int:
        """Of a token's KV."""
        return 4 * self.layers * self.kv_heads * self.dim


LLAMA_8B = Shape("8B", 32, 4096, 14336, 32, 8, 128, 128256)
TINY = Shape("tiny", 2, 32, 48, 4, 2, 8, 300, chunk_tokens=32, deviation=0.3)
"""For the emulation."""


@dataclass(frozen=True)
class Answer:
    """Logits of the first token, float32 on the host, and KV in the model's own form with so many tokens loaded."""

    logits: torch.Tensor
    kv: Any
    loaded: int = 0


Reader: TypeAlias = Callable[[torch.Tensor], Answer]


class Engine(Protocol):
    """A model, and how it takes KV from a store. Prompts are int64 [tokens] on the host."""

    name: str

    def compute(self, prompt: torch.Tensor) -> Answer:
        """Of the whole prompt, in one pass."""

    def finish(self, prompt: torch.Tensor, kv: Any, tokens: int) -> Answer:
        """Of what follows the first `tokens`, whose KV is in `kv`, which is used up."""

    def reader(self, store: SyncKVStore) -> Reader:
        """What answers a prompt as a user has it: looked up, loaded, and the rest computed."""

    def memory(self, kv: Any, tokens: int) -> LayersMemory:
        """The KV of the first `tokens` where it is."""


def open_engine(shape: Shape, device: torch.device, place: Device, *, plain: bool = False) -> Engine:
    """`place` is where KV is decoded to: `device`, or a decoder into its memory."""
    torch.manual_seed(8)
    if plain or importlib.util.find_spec("transformers") is None:
        return PlainEngine(shape, device, place)
    return TransformersEngine(shape, device, place)


class TransformersEngine:
    """transformers' model behind the connector for it."""

    def __init__(self, shape: Shape, device: torch.device, place: Device) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM, __version__

        self.name = f"transformers {__version__}"
        self._place = place
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.dim,
            max_position_embeddings=2**18,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
            rms_norm_eps=1e-5,
            initializer_range=shape.deviation,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        with device:
            self._model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        self._one_token = {
            "max_new_tokens": 1,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
        }

    def compute(self, prompt: torch.Tensor) -> Answer:
        return self._generate(prompt)

    def finish(self, prompt: torch.Tensor, kv: Any, tokens: int) -> Answer:
        for layer in kv.layers:
            layer.keys, layer.values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]
        return self._generate(prompt, past_key_values=kv)

    def reader(self, store: SyncKVStore) -> Reader:
        from kvstore_s3.connectors.transformers import PrefixCache

        cache = PrefixCache(self._model, store, device=self._place)

        def ask(prompt: torch.Tensor) -> Answer:
            found = cache.generate(prompt, **self._one_token)
            assert cache.last is not None
            return Answer(found.logits[0][0].float().cpu(), found.past_key_values, cache.last.loaded_tokens)

        return ask

    def memory(self, kv: Any, tokens: int) -> LayersMemory:
        from kvstore_s3.connectors.transformers.canonical import view_cache

        return view_cache(kv, 0, tokens)

    def _generate(self, prompt: torch.Tensor, **given: Any) -> Answer:
        ids = prompt[None].to(self._model.device)
        found = self._model.generate(ids, attention_mask=torch.ones_like(ids), **self._one_token, **given)
        return Answer(found.logits[0][0].float().cpu(), found.past_key_values)


Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""K and V of each layer, [tokens, heads, dim], K rotated."""


class PlainEngine:
    """A Llama in plain torch, one sequence at a time."""

    name = "plain torch"
    _PIECE = 8192
    """Tokens whose large activations are held at once."""

    def __init__(self, shape: Shape, device: torch.device, place: Device) -> None:
        self._shape, self._device, self._place = shape, device, place
        self._embedding = self._draw(shape.vocabulary, shape.hidden)
        self._head = self._draw(shape.vocabulary, shape.hidden)
        self._layers = [self._draw_layer() for _ in range(shape.layers)]
        pairs = torch.arange(0, shape.dim, 2, device=device, dtype=torch.float32)
        self._frequencies = THETA ** (-pairs / shape.dim)

    def compute(self, prompt: torch.Tensor) -> Answer:
        empty = torch.empty(0, self._shape.kv_heads, self._shape.dim, dtype=torch.bfloat16, device=self._device)
        return self._run(prompt, [(empty, empty)] * self._shape.layers, 0)

    def finish(self, prompt: torch.Tensor, kv: Layers, tokens: int) -> Answer:
        past = [(keys[:tokens], values[:tokens]) for keys, values in kv]
        kv.clear()  # each layer's memory is free once there is a longer one
        return self._run(prompt, past, tokens)

    def reader(self, store: SyncKVStore) -> Reader:
        def ask(prompt: torch.Tensor) -> Answer:
            kv = store.load(store.lookup(prompt), device=self._place)
            loaded = min(kv.shape[2], len(prompt) - TAIL)
            return self._run(prompt, [(layer[0, :loaded], layer[1, :loaded]) for layer in kv], loaded)

        return ask

    def memory(self, kv: Layers, tokens: int) -> LayersMemory:
        return LayersMemory(tuple((keys[:tokens], values[:tokens]) for keys, values in kv))

    def _draw(self, rows: int, columns: int) -> torch.Tensor:
        weights = torch.empty(rows, columns, dtype=torch.bfloat16, device=self._device)
        return weights.normal_(0, self._shape.deviation)

    def _draw_layer(self) -> dict[str, torch.Tensor]:
        shape = self._shape
        rows = shape.heads * shape.dim
        return {
            "qkv": self._draw(rows + 2 * shape.kv_heads * shape.dim, shape.hidden),
            "out": self._draw(shape.hidden, rows),
            "up": self._draw(2 * shape.intermediate, shape.hidden),
            "down": self._draw(shape.hidden, shape.intermediate),
        }

    @torch.no_grad()
    def _run(self, prompt: torch.Tensor, past: Layers, begin: int) -> Answer:
        x = functional.embedding(prompt[begin:].to(self._device), self._embedding)
        angles = torch.arange(begin, len(prompt), device=self._device)[:, None] * self._frequencies
        turn = angles.cos()[:, None], angles.sin()[:, None]
        kv: Layers = []
        for weights in self._layers:
            x, layer = self._attend(x, weights, past.pop(0), turn)
            kv.append(layer)
            for piece in x.split(self._PIECE):
                gate, up = functional.linear(_normalize(piece), weights["up"]).chunk(2, dim=-1)
                piece += functional.linear(functional.silu(gate) * up, weights["down"])
        logits = functional.linear(_normalize(x[-1:]), self._head)
        return Answer(logits[0].float().cpu(), kv, begin)

    def _attend(
        self,
        x: torch.Tensor,
        weights: dict[str, torch.Tensor],
        past: tuple[torch.Tensor, torch.Tensor],
        turn: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        shape = self._shape
        states = functional.linear(_normalize(x), weights["qkv"]).view(len(x), -1, shape.dim)
        queries, keys, values = states.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        keys = torch.cat([past[0], _rotate(keys, turn)])
        values = torch.cat([past[1], values])
        found = _attention(_rotate(queries, turn), keys, values)
        return x + functional.linear(found.reshape(len(x), -1), weights["out"]), (keys, values)


def _normalize(x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, x.shape[-1:], eps=1e-5)


def _rotate(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Halves of each head [tokens, heads, dim] against each other."""
    cosines, sines = (part.to(x.dtype) for part in turn)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosines - b * sines, b * cosines + a * sines], dim=-1)


def _attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Each of the last tokens attends to all up to itself: [tokens, heads, dim] in and out."""
    q, k, v = (part.transpose(0, 1)[None] for part in (queries, keys, values))
    given: dict[str, Any] = {"is_causal": True}
    if len(queries) != len(keys):
        from torch.nn.attention.bias import causal_lower_right  # torch's compiler comes with it, in seconds

        # torch's own bias goes through its flash kernel on a GPU; elsewhere it would be a mask, and a warning
        bias: Any = causal_lower_right(len(queries), len(keys))
        given = {"attn_mask": bias if q.is_cuda else bias._materialize(q.device)}
    found = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **given)
    return found[0].transpose(0, 1)
