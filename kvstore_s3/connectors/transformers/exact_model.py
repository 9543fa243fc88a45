"""The model that a calibration runs: in float32 where that fits, so that what is measured is the codec's own error.

In bfloat16 every change of the KV, however small, tips roundings all over the model; near fp8's KL, that noise would be
most of what is seen.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kvstore_s3.connectors.pretrained import load_model
from kvstore_s3.connectors.transformers.admission import check_model
from kvstore_s3.namespace import Namespace

_SHARE = 0.5
"""Of the device's memory that the weights may take."""


def load_exact(directory: Path, namespace: Namespace) -> PreTrainedModel:
    """Load the namespace's model, in float32 if its weights take at most half of the memory, else in the KV dtype.

    Raises what `load_model` and `check_model` raise: the model must be one whose KV the namespace can hold.
    """
    dtype = "float32" if _fits(directory) else namespace.layout.dtype
    model = load_model(str(directory), dtype)
    check_model(model, replace(namespace, layout=replace(namespace.layout, dtype=dtype)))
    return model


def _fits(directory: Path) -> bool:
    """Whether the weights fit in float32, taking the files' numbers to have two bytes each."""
    stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    stored = stored or sum(path.stat().st_size for path in directory.glob("*.bin"))
    return 2 * stored <= _SHARE * _free_bytes()


def _free_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
