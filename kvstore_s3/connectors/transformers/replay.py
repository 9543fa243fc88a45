"""A model run with KV that somebody else made: batches of windows, the KV of contexts, predictions of continuations.

KV of a batch is one tensor [windows, tokens, heads, layers, 2, dim] in the model's dtype, with values that the KV dtype
can hold. `strip` and `turn` go to float32 with K's rotation undone, and back.
"""

from __future__ import annotations

import inspect

import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore_s3.codec.rotation import Rotation


class Replay:
    """One model, whose cache is kept in `kv_dtype`."""

    def __init__(self, model: PreTrainedModel, kv_dtype: torch.dtype, rotation: Rotation) -> None:
        self.model = model
        self.kv_dtype = kv_dtype
        self.rotation = rotation
        skippable = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._without_logits = {"logits_to_keep": 1} if skippable else {}

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @torch.no_grad()
    def read_kv(self, ids: torch.Tensor) -> torch.Tensor:
        """KV of all tokens of `ids` [windows, tokens], as it would be stored."""
        cache = self.model(input_ids=ids.to(self.device), use_cache=True, **self._without_logits).past_key_values
        layers = [torch.stack((layer.keys, layer.values)).to(self.device) for layer in cache.layers]
        return self.round(torch.stack(layers).permute(2, 4, 3, 0, 1, 5))

    def round(self, kv: torch.Tensor) -> torch.Tensor:
        """Values as the KV dtype holds them, in the model's dtype."""
        return kv.to(self.kv_dtype).to(self.model.dtype)

    def predict(self, kv: torch.Tensor, continuation: torch.Tensor) -> torch.Tensor:
        """Log-probabilities float32 [windows, tokens, vocabulary] of a continuation behind contexts `kv`."""
        cache = DynamicCache(config=self.model.config)
        for layer in range(kv.shape[3]):
            keys, values = (kv[:, :, :, layer, kind].transpose(1, 2) for kind in (0, 1))
            device = self._layer_device(layer)
            cache.update(keys.to(device), values.to(device), layer)
        answer = self.model(input_ids=continuation.to(self.device), past_key_values=cache, use_cache=True)
        logits: torch.Tensor = answer.logits
        return logits.float().log_softmax(-1)

    def strip(self, kv: torch.Tensor) -> torch.Tensor:
        """float32, K with its rotation undone; gradients with respect to K are turned by the same."""
        return self._rotate(kv.float(), -1.0)

    def turn(self, samples: torch.Tensor) -> torch.Tensor:
        """What `strip` undid, rounded to the KV dtype."""
        return self.round(self._rotate(samples, 1.0))

    def _rotate(self, kv: torch.Tensor, sign: float) -> torch.Tensor:
        pairs = len(self.rotation.inverse_frequencies)
        if self.rotation.style == "none" or not pairs:
            return kv
        turned = kv.clone()
        cosines, sines = (torch.from_numpy(table).to(kv.device) for table in self.rotation.tables(0, kv.shape[1]))
        shape = (1, kv.shape[1], 1, 1, pairs)
        cos, sin = cosines.view(shape), sign * sines.view(shape)
        layers = torch.from_numpy(self.rotation.rotated).bool().nonzero().flatten().to(kv.device)
        keys = kv[:, :, :, layers, 0]
        one, other = _pair_places(self.rotation.style, pairs)
        a, b = keys[..., one], keys[..., other]
        result = keys.clone()
        result[..., one], result[..., other] = a * cos - b * sin, b * cos + a * sin
        turned[:, :, :, layers, 0] = result
        return turned

    def _layer_device(self, layer: int) -> torch.device:
        """Where a layer's attention is, should the model lie on several devices."""
        placed = getattr(self.model, "hf_device_map", None)
        if not placed or len(set(placed.values())) == 1:
            return self.device
        name = f".layers.{layer}"
        found = next((device for module, device in placed.items() if module.endswith(name)), None)
        return self.device if found is None else torch.device(found)


def _pair_places(style: str, pairs: int) -> tuple[slice, slice]:
    """Where the first and the second number of each pair are in a head."""
    if style == "pairs":
        return slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    return slice(0, pairs), slice(pairs, 2 * pairs)


def measure_style(replay: Replay, kv: torch.Tensor) -> str:
    """The style of rotation whose undoing leaves K the least to tell: the smallest mean log-variance of its numbers."""
    flat = {}
    for style in ("none", "halves", "pairs"):
        rotation = Rotation(style, replay.rotation.inverse_frequencies, replay.rotation.rotated)
        keys = Replay(replay.model, replay.kv_dtype, rotation).strip(kv)[:, 1:, :, :, 0]
        keys = keys[torch.isfinite(keys).flatten(2).all(-1)]
        if replay.rotation.style == "none" or len(keys) < 2:
            return replay.rotation.style
        flat[style] = float(keys.double().var(0).clamp_min(1e-12).log().mean())
    return min(flat, key=lambda style: flat[style])
