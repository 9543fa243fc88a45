"""Where requests to a bucket go: read off a URL that the AWS client has signed, so that all its rules are heeded.

Those rules (regions, path or virtual-host addressing, FIPS, dual stack, AWS_ENDPOINT_URL, profiles) are botocore's.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

PLACEHOLDER = "k"
"""The key of the object in the URL that is signed to learn the route."""


class NoRouteError(Exception):
    """This endpoint wants something else than Signature V4 to a host; the message says what."""


@dataclass(frozen=True, slots=True)
class Route:
    """`authority` is the Host header; a key follows on `path`; region and service are what signatures name."""

    tls: bool
    host: str
    port: int
    authority: str
    path: str
    region: str
    service: str


def read_route(signed_url: str) -> Route:
    """Return the route in a URL that was signed for GetObject of PLACEHOLDER. Raises NoRouteError."""
    parts = urlsplit(signed_url)
    query = parse_qs(parts.query)
    if query.get("X-Amz-Algorithm") != ["AWS4-HMAC-SHA256"] or "X-Amz-S3session-Token" in query:
        raise NoRouteError("its requests are signed in another way than by Signature V4")
    scope = query.get("X-Amz-Credential", [""])[0].split("/")[-4:]
    path, slash, last = parts.path.rpartition("/")
    if parts.hostname is None or unquote(last) != PLACEHOLDER or not slash or scope[-1] != "aws4_request":
        raise NoRouteError("its addresses are not understood")
    if "S3session" in parts.query:
        raise NoRouteError("it wants sessions")
    tls = parts.scheme == "https"
    default = 443 if tls else 80
    name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    port = parts.port or default
    authority = name if port == default else f"{name}:{port}"
    return Route(tls, parts.hostname, port, authority, f"{path}/", region=scope[1], service=scope[2])
