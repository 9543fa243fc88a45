"""From a model's name to its directory: a local one, or a Hugging Face hub id through the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kvstore_s3.errors import InvalidArgumentError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)

_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)

_CONFIG_PATTERNS = ["*.json", "*.py"]

_WEIGHT_PATTERNS = (["*.safetensors"], ["*.bin", "*.pt", "*.pth", "*.gguf"])
"""Tried in this order: a repository often has the same weights in both."""

_IGNORED = ["*/*.safetensors", "*/*.bin", "*/*.pt", "*/*.pth", "*/*.gguf"]
"""Weights in folders are other variants, not what an engine loads."""


def find_model_directory(name: str | Path, *, commit: str | None = None, weights: bool = True) -> Path:
    """Return the directory of a model: `name` itself, or the snapshot of the hub id `name`, downloaded where needed.

    A hub id is resolved as engines resolve it: the newest commit of `main` if the hub is reached, else what the cache
    has; `commit` (40 hex digits) pins it. `weights` False fetches configs and code alone. Needs the package
    `huggingface_hub` for hub ids. Raises `InvalidArgumentError` if `name` is neither.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    if not isinstance(name, str) or _HUB_ID.fullmatch(name) is None:
        raise InvalidArgumentError(f"no model directory {str(name)!r}, and it is no hub id such as 'acme/llama-8b'")
    if commit is not None and _COMMIT.fullmatch(commit) is None:
        raise InvalidArgumentError(
            f"revision {commit!r} of hub model {name!r} is no commit hash of 40 hex digits; a branch or tag can move "
            "to other weights, so give the commit, or none to take the digest of the weights"
        )
    if not weights:
        return _download(name, commit, _CONFIG_PATTERNS)
    for patterns in _WEIGHT_PATTERNS:
        directory = _download(name, commit, _CONFIG_PATTERNS + patterns)
        if any(path for pattern in patterns for path in directory.glob(pattern)):
            break
    return directory


def _download(name: str, commit: str | None, patterns: list[str]) -> Path:
    hub, failures = _import_hub(name)
    try:
        return Path(hub.snapshot_download(name, revision=commit, allow_patterns=patterns, ignore_patterns=_IGNORED))
    except failures as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InvalidArgumentError(
            f"{name!r} is neither a directory nor a model that the Hugging Face hub or its local cache has; give the "
            f"directory of a model, or check the id and the network ({reason[0]})"
        ) from error


def _import_hub(name: str) -> tuple[Any, tuple[type[Exception], ...]]:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise InvalidArgumentError(
            f"there is no directory {name!r}; to take it for a hub id, install huggingface_hub"
        ) from error
    # Its own HTTP errors derive from those of the transport library, which has changed between its versions.
    return huggingface_hub, (OSError, ValueError, *huggingface_hub.errors.HfHubHTTPError.__bases__)
