"""What the caller hands over: one prompt, and arguments for `generate` that do not change its KV."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from kvstore_s3.errors import InvalidArgumentError

_ONE_SEQUENCE = ("num_beams", "num_return_sequences")
_OTHER_LOOPS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "custom_generate")
"""Other generation loops. transformers' speculative one computes a whole prompt again on top of a filled cache."""

_HARMLESS = (
    "attention_mask",
    "use_cache",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
)
"""Arguments of a model's forward that leave the prompt's KV alone; the first two are checked for themselves."""


def as_prompt(input_ids: Any) -> torch.Tensor:
    """Return token ids (list, numpy array or tensor of [n] or [1, n]) as an int64 tensor [1, n] on the CPU, n >= 1."""
    if isinstance(input_ids, Mapping):
        raise InvalidArgumentError("expected token ids, not a mapping; unpack a tokenizer's answer: generate(**inputs)")
    try:
        ids = torch.as_tensor(input_ids).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidArgumentError(f"input_ids are not token ids of one prompt: {error}") from error
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InvalidArgumentError(f"input_ids must be integers, not {ids.dtype}; give at least one token id")
    if ids.dim() == 2 and ids.shape[0] > 1:
        raise InvalidArgumentError(f"expected one prompt, found a batch of {ids.shape[0]}; call once for each prompt")
    if ids.dim() not in (1, 2) or ids.numel() == 0:
        raise InvalidArgumentError(f"input_ids must have shape [n] or [1, n] with n >= 1, not {list(ids.shape)}")
    return ids.reshape(1, -1).long()


def check_arguments(model: PreTrainedModel, prompt: torch.Tensor, arguments: Mapping[str, Any]) -> None:
    """Raise for arguments of `generate` that change the prompt's KV, or that need more than one sequence of it."""
    _check_mask(arguments.get("attention_mask"), prompt)
    settings = arguments.get("generation_config") or model.generation_config
    for name in _ONE_SEQUENCE:
        if (_setting(name, arguments, settings) or 1) > 1:
            raise InvalidArgumentError(f"{name} > 1 is not supported: one prompt, one sequence; leave it at 1")
    for name in _OTHER_LOOPS:
        if _setting(name, arguments, settings):
            raise InvalidArgumentError(f"{name} is not supported: it would go wrong with a loaded prefix; leave it out")
    if _setting("use_cache", arguments, settings) is False:
        raise InvalidArgumentError("use_cache=False leaves no KV to load or save; call model.generate instead")
    kind = _setting("cache_implementation", arguments, settings)
    if kind not in (None, "dynamic"):
        raise InvalidArgumentError(f"cache_implementation={kind!r} is not supported; leave it unset (dynamic)")
    forward = set(inspect.signature(model.forward).parameters) - set(_HARMLESS)
    for name, value in arguments.items():
        fed = name in forward or name == "inputs" or isinstance(value, torch.Tensor)
        if fed and value is not None and name not in _HARMLESS:
            raise InvalidArgumentError(f"{name} is not supported: the prompt's KV would depend on more than its tokens")


def _setting(name: str, arguments: Mapping[str, Any], settings: Any) -> Any:
    return arguments[name] if name in arguments else getattr(settings, name, None)


def _check_mask(mask: Any, prompt: torch.Tensor) -> None:
    if mask is None:
        return
    mask = torch.as_tensor(mask)
    if mask.numel() != prompt.numel() or not bool((mask == 1).all()):
        raise InvalidArgumentError(
            "attention_mask must be all ones and as long as the prompt: padding shifts positions; pass it unpadded"
        )
