"""What a user may write into `kv_connector_extra_config`, checked once. Pure; no vLLM here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from kvstore_s3.config import Settings
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.quality import QUALITIES

MiB = 1024 * 1024

_CREDENTIAL = re.compile(r"secret|passw|credential|access_?key|session_?token|api_?key|auth|signature", re.IGNORECASE)


_CHOICES: Mapping[str, tuple[object, ...]] = {
    "load_mode": ("async", "by-layer"),
    "admission": ("cost", "always"),
    "save_at": (1, 2),
}
_LEAST, _MOST = 1e-6, 1e15
"""Numbers beyond are slips, and would overflow somewhere."""
_OPTIONAL = {"prefill_tokens_per_s", "first_token_deadline_s"}


@dataclass(frozen=True, slots=True)
class Options:
    """The connector's own settings. Everything else comes from `Settings` (`KVSTORE_S3_*`, kvstore-s3.toml)."""

    store: str
    """URL of the store: file:///dir, s3://bucket/prefix or memory://. Default: Settings.store."""

    chunk_tokens: int
    """Tokens in a chunk; part of the namespace. Default: Settings.chunk_tokens."""

    profile: str
    """Quality of what is saved and loaded (see `quality.QUALITIES`). Default: Settings.profile."""

    lookup_deadline_s: float = 1.0
    """Seconds that a request waits for the store's answer whether its prefix is there; then it is computed."""

    load_deadline_s: float = 30.0
    """Seconds after which a load is given up and its tokens are computed."""

    save_memory_bytes: int = 1024 * MiB
    """Most bytes of KV that wait to be encoded and uploaded; what does not fit is not saved."""

    flush_s: float = 4.0
    """Seconds that a stopping engine waits for saves under way."""

    load_mode: str = "async"
    """"async": a request is scheduled once all of its layers are there, and others go on meanwhile. "by-layer": it is
    scheduled at once, and each layer of the step waits for its own KV, with all requests of the step."""

    admission: str = "cost"
    """"cost": look up, load and save where measured speeds say it repays (docs/admission.md). "always": do not ask."""

    save_at: int = 1
    """At which sight of a prefix it is saved: 1 saves whatever is computed, 2 keeps one-shot contexts out."""

    prefill_tokens_per_s: float | None = None
    """How fast the engine computes a prompt, believed instead of any measurement. None: measured, by an earlier start
    at first."""

    first_token_deadline_s: float | None = None
    """Seconds to the first token that lossy profiles may be read at lower quality for, down to the setting
    `lowest_profile`. None: quality is never lowered."""

    follow_stall_s: float = 2.0
    """Seconds without a new chunk after which a decode engine stops waiting for the prefill engine and computes."""

    @classmethod
    def parse(cls, extra: Mapping[str, Any], settings: Settings) -> Options:
        """Check `kv_connector_extra_config`. Raises `InvalidArgumentError`, never with a value that may be secret."""
        known = {field.name for field in fields(cls)}
        for name in extra:
            if name not in known:
                _refuse_name(name, known)
        defaults = {"store": settings.store, "chunk_tokens": settings.chunk_tokens, "profile": settings.profile}
        values = {**defaults, **extra}
        _check_store(values["store"])
        _check_profile(values["profile"])
        for name, allowed in _CHOICES.items():
            if name in values and (values[name] not in allowed or isinstance(values[name], bool)):
                shown = " or ".join(map(repr, allowed))
                raise InvalidArgumentError(f"kv_connector_extra_config: {name} must be {shown}, not {values[name]!r}")
        for name in known - {"store", "profile", *_CHOICES}:
            if name in values and not (values[name] is None and name in _OPTIONAL):
                _check_number(name, values[name], whole=name in {"chunk_tokens", "save_memory_bytes"})
        return cls(**values)


def _refuse_name(name: str, known: set[str]) -> None:
    if _CREDENTIAL.search(name):
        raise InvalidArgumentError(
            f"kv_connector_extra_config has {name!r}, which looks like a credential: configurations are logged. "
            "Credentials come from the default AWS chain (environment, profile, instance role); remove it"
        )
    raise InvalidArgumentError(
        f"kv_connector_extra_config has the unknown key {name!r}; known are {', '.join(sorted(known))}. "
        "Endpoint, region and time-outs are settings: KVSTORE_S3_ENDPOINT_URL and so on"
    )


def _check_store(url: object) -> None:
    if not isinstance(url, str) or not url:
        raise InvalidArgumentError(
            'no store is named; give kv_connector_extra_config {"store": "s3://bucket/prefix"} or set KVSTORE_S3_STORE'
        )
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidArgumentError(f"the store's URL cannot be read ({error}): write s3://bucket/prefix") from error
    if "@" in parts.netloc or parts.query:
        raise InvalidArgumentError(
            "the store's URL carries a user, a password or a query; configurations are logged, so credentials come "
            "from the default AWS chain: write s3://bucket/prefix"
        )


def _check_profile(profile: object) -> None:
    if not isinstance(profile, str) or profile not in QUALITIES:
        raise InvalidArgumentError(
            f"kv_connector_extra_config: unknown profile {profile!r}; use one of {', '.join(QUALITIES)}"
        )


def _check_number(name: str, value: object, *, whole: bool) -> None:
    kinds = int if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not _LEAST <= value <= _MOST:
        kind = "a positive integer" if whole else "a positive number"
        raise InvalidArgumentError(f"kv_connector_extra_config: {name} must be {kind}, not {value!r}")
