"""From a URL to an object store.

file:///absolute/dir     a directory on this machine: the embedded default
s3://bucket/prefix       S3 or a server that speaks it (settings: endpoint_url, region, path_style)
memory://NAME            shared by all who open NAME in this process; a bare memory:// is private to that open
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from kvstore_s3.config import Settings
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.metrics import Count, ignore
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.objectstore.local import LocalStore
from kvstore_s3.objectstore.memory import MemoryStore

_MEMORY_NAME = re.compile(r"[A-Za-z0-9._-]*", re.ASCII)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", re.ASCII)
_PREFIX_PART = re.compile(r"[A-Za-z0-9_=+@!-][A-Za-z0-9._=+@!-]*", re.ASCII)
_MAX_PREFIX = 500
"""So that prefix, '/' and a key of 512 characters stay below S3's limit of 1,024."""


def open_store(url: str, settings: Settings, count: Count = ignore) -> ObjectStore:
    """Return the store that `url` names, not yet connected: `probe` tells early whether it can be used.

    `count` is told of requests, retries and the like.

    The S3 client is imported here and for s3:// alone. A store belongs to the event loop that it is first used in.
    Raises InvalidArgumentError where the URL or the endpoint in `settings` cannot be right.
    """
    parts = _split(url)
    match parts.scheme:
        case "file":
            threads = max(settings.download_concurrency, settings.upload_concurrency)
            return LocalStore(_parse_directory(parts), threads=threads)
        case "s3":
            from kvstore_s3.objectstore.s3 import S3Store

            bucket, prefix = _parse_bucket(parts)
            _check_endpoint(settings.endpoint_url)
            return S3Store(bucket, prefix, settings, count)
        case "memory":
            return MemoryStore(_parse_name(parts))
        case _:
            raise InvalidArgumentError(
                f"unknown scheme {parts.scheme!r} in the store URL; use file://, s3:// or memory://"
            )


def _split(url: str) -> SplitResult:
    if "://" not in url:
        hint = f"file://{url}" if url.startswith("/") else "file:///absolute/dir or s3://bucket/prefix"
        raise InvalidArgumentError(f"{url!r} is not a store URL; write {hint}")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidArgumentError(f"the store URL cannot be parsed: {error}") from error
    if "@" in parts.netloc:
        raise InvalidArgumentError("a store URL must not hold credentials; they come from the default AWS chain")
    if "?" in url or "#" in url:
        raise InvalidArgumentError(
            "a store URL has no '?' or '#'; options are settings (in file://, write %3F and %23)"
        )
    return parts


def _parse_directory(parts: SplitResult) -> Path:
    if parts.netloc not in ("", "localhost"):
        raise InvalidArgumentError(f"file://{parts.netloc}{parts.path} is relative; write file:///absolute/dir")
    path = Path(unquote(parts.path))
    if path == Path("/") or path == Path():
        raise InvalidArgumentError("file:// names no directory; write file:///absolute/dir")
    if ".." in path.parts or "\0" in str(path):
        raise InvalidArgumentError(f"{str(path)!r} contains '..' or NUL; write the absolute path of a directory")
    return path


def _parse_bucket(parts: SplitResult) -> tuple[str, str]:
    if not parts.netloc:
        raise InvalidArgumentError("the store URL names no bucket; write s3://bucket/prefix")
    if _BUCKET.fullmatch(parts.netloc) is None:
        raise InvalidArgumentError(
            f"{parts.netloc!r} is not a bucket name (3 to 63 lower-case letters, digits, '.', '-'); "
            "an endpoint does not go into the URL but into the setting endpoint_url"
        )
    prefix = parts.path.removeprefix("/").removesuffix("/")
    if len(prefix) > _MAX_PREFIX:
        raise InvalidArgumentError(
            f"the prefix has {len(prefix)} characters; at most {_MAX_PREFIX} leave room for keys"
        )
    for part in prefix.split("/") if prefix else ():
        if _PREFIX_PART.fullmatch(part) is None:
            raise InvalidArgumentError(
                f"{part!r} cannot be a part of the prefix: use letters, digits and '._=+@!-', and no dot in front"
            )
    return parts.netloc, prefix


def _parse_name(parts: SplitResult) -> str:
    if parts.path.strip("/") or _MEMORY_NAME.fullmatch(parts.netloc) is None:
        raise InvalidArgumentError("write memory:// or memory://NAME, with letters, digits and '._-' in the name")
    return parts.netloc


def _check_endpoint(endpoint: str | None) -> None:
    """Refuse here what the S3 client would take for something else, or would print in its errors."""
    if endpoint is None:
        return
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError as error:
        raise InvalidArgumentError(f"endpoint_url cannot be parsed: {error}") from error
    if "@" in parts.netloc:
        raise InvalidArgumentError("endpoint_url must not hold credentials; they come from the default AWS chain")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query or parts.fragment:
        raise InvalidArgumentError(f"endpoint_url {endpoint!r} is not one; write http://host:port or https://host:port")
