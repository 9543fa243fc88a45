"""Tokenizer, context length and weights of a model, loaded with transformers; its errors are mapped here."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore_s3.errors import InvalidArgumentError, UnsupportedModelError
from kvstore_s3.hub import find_model_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COMPUTABLE = ("bfloat16", "float16", "float32")
"""KV dtypes that transformers computes with; the 8-bit ones are made by other engines."""

_LOAD_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError)
"""What transformers raises for files that it cannot use, by version and kind of file."""


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model directory or hub id. Raises `InvalidArgumentError` where it has none."""
    _require_transformers()
    from transformers import AutoTokenizer

    _silence()
    try:
        directory = Path(name).expanduser()
        tokenizer = AutoTokenizer.from_pretrained(directory if directory.is_dir() else name)
        if not len(tokenizer) or tokenizer("probe", add_special_tokens=False)["input_ids"] == []:
            raise ValueError("it has no vocabulary")
    except json.JSONDecodeError as error:
        raise InvalidArgumentError(f"the tokenizer of {name!r} is damaged: {error}; fetch the model again") from error
    except _LOAD_ERRORS as error:
        raise InvalidArgumentError(
            f"no tokenizer can be loaded from {name!r} ({_first_line(error)}); "
            "put tokenizer.json and tokenizer_config.json beside its config.json"
        ) from error
    return tokenizer


def read_context_tokens(name: str) -> int | None:
    """Return the most tokens that the model was made for (max_position_embeddings), None where its config is silent."""
    _require_transformers()
    from transformers import AutoConfig

    _silence()
    try:
        config = AutoConfig.from_pretrained(find_model_directory(name)).get_text_config(decoder=True)
    except _LOAD_ERRORS as error:
        raise UnsupportedModelError(f"transformers cannot use {name!r}: {_first_line(error)}") from error
    tokens = getattr(config, "max_position_embeddings", None)
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def load_model(name: str, dtype: str) -> PreTrainedModel:
    """Load the weights of a causal language model in `dtype`, onto the first GPU where there is one.

    Raises `InvalidArgumentError` for weights that are missing or damaged, or a dtype that it cannot compute with.
    """
    _require_transformers()
    import torch
    from transformers import AutoModelForCausalLM

    check_computable(dtype)
    _silence()
    directory = find_model_directory(name)
    try:
        from safetensors import SafetensorError

        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    except (*_LOAD_ERRORS, SafetensorError) as error:
        raise InvalidArgumentError(f"the model {str(name)!r} cannot be loaded: {_first_line(error)}") from error
    model.eval()
    return model.to("cuda") if torch.cuda.is_available() else model


def check_computable(dtype: str) -> None:
    """Raise `InvalidArgumentError` for a KV dtype that transformers does not compute with."""
    if dtype not in _COMPUTABLE:
        raise InvalidArgumentError(f"dtype {dtype!r} cannot be computed here; use one of {', '.join(_COMPUTABLE)}")


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise InvalidArgumentError("this needs transformers: pip install 'kvstore-s3[transformers]'") from error


def _silence() -> None:
    """No bars and advice between the lines of progress: what matters comes as an exception."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":. ")
