"""Options that all verbs share, and how flags become `Settings`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore_s3.errors import InvalidArgumentError

if TYPE_CHECKING:
    from kvstore_s3.config import Settings

Store = Annotated[
    str | None,
    typer.Option("--store", metavar="URL", help="file:///dir, s3://bucket/prefix (default: the setting store)."),
]
Endpoint = Annotated[
    str | None, typer.Option("--endpoint-url", metavar="URL", help="S3 endpoint, such as http://127.0.0.1:9000.")
]
Region = Annotated[str | None, typer.Option("--region", metavar="NAME", help="S3 region.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def read_settings(**flags: Any) -> Settings:
    """`load_settings`, imported late: help must not wait for pydantic."""
    from kvstore_s3.config import load_settings

    return load_settings(**flags)


def check_profile(profile: str | None) -> None:
    """Refuse a profile that does not exist, naming those that do. Raises `InvalidArgumentError`."""
    if profile is not None:
        from kvstore_s3.quality import find_quality

        find_quality(profile)


def require_store(settings: Settings) -> str:
    if settings.store is None:
        raise InvalidArgumentError(
            'no store given; use --store URL, KVSTORE_S3_STORE or store = "URL" in kvstore-s3.toml '
            "(file:///dir or s3://bucket/prefix)"
        )
    return settings.store
