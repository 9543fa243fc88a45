"""Options that all verbs share, and how flags become `Settings`."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore_s3.errors import InvalidArgumentError

if TYPE_CHECKING:
    from pydantic import ValidationError

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


def load_settings(**flags: Any) -> Settings:
    """Settings from flags (None: not given), the environment, `kvstore-s3.toml` and the defaults, in this order.

    Raises `InvalidArgumentError` naming the first wrong setting.
    """
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from kvstore_s3.config import Settings

    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        raise InvalidArgumentError(_explain(error, given)) from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgumentError(f"kvstore-s3.toml is not TOML: {error}; mend or remove it") from error
    except (SettingsError, OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"the settings cannot be read: {error}") from error


def require_store(settings: Settings) -> str:
    if settings.store is None:
        raise InvalidArgumentError(
            'no store given; use --store URL, KVSTORE_S3_STORE or store = "URL" in kvstore-s3.toml '
            "(file:///dir or s3://bucket/prefix)"
        )
    return settings.store


def _explain(error: ValidationError, given: dict[str, Any]) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    if first["type"] == "extra_forbidden":
        return f"{name!r} in kvstore-s3.toml is not a setting; check its spelling"
    flag = "--" + name.replace("_", "-")
    source = flag if name in given else f"KVSTORE_S3_{name.upper()} or {name} in kvstore-s3.toml"
    problem = first["msg"][:1].lower() + first["msg"][1:]
    return f"{source}: {problem}, not {first['input']!r}"
