"""Namespace: all that makes KV interchangeable. Its digest is in every chunk key's root and in every object key.

The digest is BLAKE3 in derive_key mode (context `NAMESPACE_CONTEXT`) over the canonical JSON: keys sorted, no white
space, ASCII, floats without a fraction written as integers. Change one field, and every lookup misses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.layout import KVLayout

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
