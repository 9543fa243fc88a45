"""The vLLM connector: `kv_connector_module_path="kvstore_s3.connectors.vllm"`, `kv_connector="KVStoreS3Connector"`.

`docs/vllm.md` says how to switch it on, what it does and what it refuses. vLLM is imported on first use of the class,
so that the parts that need no engine can be used and tested without one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore_s3.connectors.vllm.connector import KVStoreS3Connector

__all__ = ["KVStoreS3Connector"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.connector"), name)
