"""LoRA adapters by their content. A name can be given to other weights, and the same weights to another name.

Pure of the engine. The digest is that of the adapter's directory (`weights.weights_digest`), and what the engine does
with adapters in general (dtype, modules left out) is mixed in.

An engine loads an adapter once per id and keeps it, whatever becomes of the files. So an id stays with the content that
was first seen under it: where its directory changes, or the id comes with another path, nobody knows which weights
the engine holds, and requests with it are left alone from then on.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.weights import weights_digest

ADAPTER_CONTEXT = "kvstore-s3 v1 vllm adapter"
"""BLAKE3 derive_key context of what stands for an adapter in a chunk key's root."""

_SETTINGS = ("lora_dtype", "target_modules", "enable_moe_shared_loras", "enable_mixed_moe_lora_format")
"""Fields of vLLM's LoRAConfig that change what an adapter computes. Ranks and capacities do not."""


class AdapterDigests:
    """Digests of the adapters that an engine has been asked for. Safe to use from any thread."""

    def __init__(self, cache_dir: Path, lora_config: Any = None) -> None:
        """`cache_dir` remembers what was read of files (`Settings.cache_dir`); `lora_config` is vLLM's, or None."""
        self._cache_dir = cache_dir
        self._settings = {name: str(getattr(lora_config, name, None)) for name in _SETTINGS}
        self._seen: dict[int, bytes | None] = {}
        self._lock = threading.Lock()

    async def find(self, adapter_id: int, path: str, *, in_place: bool = False) -> bytes:
        """Return 32 bytes for what the adapter computes. Its files are read in a thread, if they are new or changed.

        `adapter_id`, `path` and `in_place` are `lora_int_id`, `lora_path` and `load_inplace` of the request's
        LoRARequest. Raises `InvalidArgumentError`, with the reason, where the engine's weights are not known for sure:
        the request is to be computed, and nothing of it saved.
        """
        return await asyncio.to_thread(self._find, adapter_id, path, in_place)

    def _find(self, adapter_id: int, path: str, in_place: bool) -> bytes:
        found = self._digest(path)
        with self._lock:
            known = self._seen.setdefault(adapter_id, found)
            if in_place or known != found:
                self._seen[adapter_id] = None
                raise InvalidArgumentError(
                    f"adapter {adapter_id} is not what it was when it was first used, and the engine may hold either; "
                    "give changed adapters a new id, which vLLM does for a new name"
                )
        return found

    def _digest(self, path: str) -> bytes:
        directory = Path(path).expanduser()
        if not directory.is_dir():
            raise InvalidArgumentError(
                f"the adapter {path!r} is no directory on this machine; give the path of its files instead of a hub id"
            )
        return _mix(weights_digest(directory, self._cache_dir), self._settings)


def _mix(content: str, settings: Mapping[str, str]) -> bytes:
    document = json.dumps({"content": content, "settings": settings}, sort_keys=True, separators=(",", ":"))
    return blake3(document.encode("ascii"), derive_key_context=ADAPTER_CONTEXT).digest()
