"""Namespace: all that makes KV interchangeable. Its digest is in every chunk key's root and in every object key.

The digest is BLAKE3 in derive_key mode (context `NAMESPACE_CONTEXT`) over the canonical JSON: keys sorted, no white
space, ASCII, floats without a fraction written as integers. Change one field, and every lookup misses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.hub import find_model_directory
from kvstore_s3.layout import KVLayout
from kvstore_s3.weights import read_json, weights_digest

FORMAT = 1
"""Version of keys and namespaces, inside the JSON. Another version shares nothing with this one."""

NAMESPACE_CONTEXT = "kvstore-s3 v1 namespace"
"""BLAKE3 derive_key context of namespace digests."""

MAX_JSON_BYTES = 65536
"""Longest namespace document that is read."""


def canonical_json(value: object) -> str:
    """Return the one spelling of a JSON value: sorted keys, no white space, ASCII, 10000.0 as 10000.

    Other floats are Python's shortest repr that reads back as the same double. NaN and infinities are refused.
    """
    return json.dumps(_normal(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _normal(value: object) -> object:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidArgumentError(f"a namespace cannot hold {value!r}: only finite numbers")
        return int(value) if value.is_integer() else value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InvalidArgumentError(f"a namespace holds names of type str, not {key!r}")
        return {key: _normal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_normal(item) for item in value]
    raise InvalidArgumentError(f"a namespace holds JSON values, not {type(value).__name__}: {value!r}")


@dataclass(frozen=True, slots=True)
class Namespace:
    """What a cache entry belongs to. Equal digests mean: the KV of one may be used for the other.

    `model` names the architecture or the model, `revision` its weights (a commit, or a digest of their content),
    `lora` the content of an adapter, `variant` whatever else changes KV values, such as quantisation at run time.
    """

    model: str
    revision: str
    layout: KVLayout
    chunk_tokens: int = 256
    lora: str | None = None
    variant: str | None = None
    digest: bytes = field(init=False, repr=False, compare=False)
    """BLAKE3 of the canonical JSON, 32 bytes."""

    def __post_init__(self) -> None:
        for name in ("model", "revision"):
            _check_text(name, getattr(self, name))
        for name in ("lora", "variant"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        if not isinstance(self.layout, KVLayout):
            raise InvalidArgumentError(f"layout must be a KVLayout, not {type(self.layout).__name__}")
        _check_chunk_tokens(self.chunk_tokens)
        digest = blake3(self.to_json().encode("ascii"), derive_key_context=NAMESPACE_CONTEXT).digest()
        object.__setattr__(self, "digest", digest)

    @property
    def hex(self) -> str:
        """The digest as 64 lower-case hex digits: the second part of every object key."""
        return self.digest.hex()

    def to_json(self) -> str:
        """The canonical JSON: the digest's preimage, and what is stored beside the data for people."""
        return canonical_json(
            {
                "format": FORMAT,
                "model": self.model,
                "revision": self.revision,
                "layout": self.layout.to_json(),
                "chunk_tokens": self.chunk_tokens,
                "lora": self.lora,
                "variant": self.variant,
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Namespace:
        """Read what `to_json` wrote; white space and the order of keys do not count. Raises `InvalidArgumentError`."""
        document = _parse_document(text)
        if document.pop("format", None) != FORMAT:
            raise InvalidArgumentError(
                f"this is not a namespace of format {FORMAT}; read it with the version that wrote it"
            )
        names = {"model", "revision", "layout", "chunk_tokens", "lora", "variant"}
        if set(document) != names:
            raise InvalidArgumentError(f"a namespace has the fields {sorted(names)}, not {sorted(document)}")
        return cls(**{**document, "layout": KVLayout.from_json(document["layout"])})

    @classmethod
    def from_model(
        cls,
        path_or_hub_id: str | Path,
        *,
        dtype: Any = None,
        chunk_tokens: int = 256,
        revision: str | None = None,
        lora: str | Path | None = None,
        variant: str | None = None,
        cache_dir: Path | None = None,
        layout: KVLayout | None = None,
    ) -> Namespace:
        """Return the namespace of a model directory or hub id: the same one from every engine, wherever it lies.

        config.json is read here and never through an engine. `model` is its first architecture; `revision` is
        "weights:" and `weights.weights_digest` of the directory, unless given: for a directory any text that changes
        with the weights, for a hub id a commit hash, which is then also what is fetched. With a given revision, no
        weights are read. The digests of weights are remembered in `cache_dir` (default: `Settings.cache_dir`), so
        that only the first start reads them; see `weights_digest`.

        `dtype` is the KV dtype (torch dtype or name; default: the config's). `lora` is the directory of an adapter,
        whose content enters the namespace. `layout` (instead of `dtype`) is for models that
        `KVLayout.from_config` does not know.

        Blocking: it reads the disk, and for a hub id the network. While `main` of a hub id can move, load the model
        from `hub.find_model_directory(...)`, not by its id. Raises `InvalidArgumentError`, `UnsupportedModelError`.
        """
        if layout is not None and dtype is not None:
            raise InvalidArgumentError("give dtype or layout, not both: a layout has its own dtype")
        directory = find_model_directory(path_or_hub_id, commit=revision, weights=revision is None)
        config = read_json(directory / "config.json")
        layout = layout or KVLayout.from_config(config, dtype=dtype)
        cache_dir = cache_dir or _default_cache_dir()
        return cls(
            model=_model_name(config),
            revision=_content_revision(directory, cache_dir) if revision is None else revision,
            layout=layout,
            chunk_tokens=chunk_tokens,
            lora=None if lora is None else _content_revision(_adapter_directory(lora), cache_dir),
            variant=variant,
        )


def _content_revision(directory: Path, cache_dir: Path) -> str:
    return f"weights:{weights_digest(directory, cache_dir)}"


def _adapter_directory(lora: str | Path) -> Path:
    if not Path(lora).is_dir():
        raise InvalidArgumentError(f"lora must be the directory of an adapter (adapter_config.json), not {str(lora)!r}")
    return Path(lora)


def _model_name(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    if not isinstance(name, str):
        raise InvalidArgumentError(f"the config names no architecture or model_type, found {name!r}")
    return name


def _default_cache_dir() -> Path:
    from kvstore_s3.config import load_settings  # here, so that pure users of namespaces read no settings

    return load_settings().cache_dir


def _parse_document(text: str | bytes) -> dict[str, Any]:
    if len(text) > MAX_JSON_BYTES:
        raise InvalidArgumentError(f"a namespace document has at most {MAX_JSON_BYTES} bytes, not {len(text)}")
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"this is not a namespace document: {error}") from error
    if not isinstance(document, dict):
        raise InvalidArgumentError(f"a namespace document is a JSON object, not a {type(document).__name__}")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return document


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= 1024 or not value.isprintable():
        raise InvalidArgumentError(f"{name} must be 1 to 1024 printable characters, not {value!r}")


def _check_chunk_tokens(value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 16 <= value <= 65536 or value % 16:
        raise InvalidArgumentError(f"chunk_tokens must be a multiple of 16 from 16 to 65536, not {value!r}")
