"""kvstore_s3: persistent LLM KV caches on object stores.

The public names are listed in `__all__`; everything else is private. They are imported on first use, so that
`import kvstore_s3` costs nothing and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore_s3.config import Settings
    from kvstore_s3.errors import KVStoreError
    from kvstore_s3.layout import KVLayout
    from kvstore_s3.namespace import Namespace
    from kvstore_s3.planner import PrefillSpeed
    from kvstore_s3.runtime import connect
    from kvstore_s3.store import Hit, KVStore, LayerGroup, Pace, Saved

__version__ = "0.1.0"

_HOMES = {
    "Hit": "store",
    "KVLayout": "layout",
    "KVStore": "store",
    "KVStoreError": "errors",
    "LayerGroup": "store",
    "Namespace": "namespace",
    "Pace": "store",
    "PrefillSpeed": "planner",
    "Saved": "store",
    "Settings": "config",
    "connect": "runtime",
}

__all__ = [
    "Hit",
    "KVLayout",
    "KVStore",
    "KVStoreError",
    "LayerGroup",
    "Namespace",
    "Pace",
    "PrefillSpeed",
    "Saved",
    "Settings",
    "connect",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"kvstore_s3.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
