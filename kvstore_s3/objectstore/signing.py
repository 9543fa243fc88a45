"""Signature V4 by botocore's signer, fed without the request objects that make up most of its cost.

Payloads are not hashed (UNSIGNED-PAYLOAD): a PUT carries a CRC-32C, which is signed, and sections have digests.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import quote

from botocore.auth import S3SigV4Auth

_UNSIGNED = "UNSIGNED-PAYLOAD"


class Credentials(Protocol):
    """Frozen credentials, as botocore has them."""

    access_key: str
    secret_key: str
    token: str | None


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What botocore's signer looks at in a request."""

    context: dict[str, str]


class Signer(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
    """Signs requests to one host, with one set of credentials; the key derived for the day is kept."""

    def __init__(self, credentials: Credentials, *, region: str, service: str, authority: str) -> None:
        super().__init__(credentials, service, region)
        self._authority = authority
        self._day = ""
        self._key = b""
        self._second = -1
        self._stamp = _Stamp({"timestamp": ""})

    def sign(self, method: str, target: str, headers: Mapping[str, str], *, now: float | None = None) -> bytes:
        """Return the head of a request: its line, `headers` (names in lower case) and the signature over both.

        `target` is the path, with a query if there is one, quoted and in order; `now` is in seconds since 1970. The
        header content-length is sent and not signed, expect as well.
        """
        stamp = self._stamp_of(int(time.time() if now is None else now))
        timestamp = stamp.context["timestamp"]
        signed = {"host": self._authority, "x-amz-content-sha256": _UNSIGNED, "x-amz-date": timestamp, **headers}
        if self.credentials.token:
            signed["x-amz-security-token"] = self.credentials.token
        path, _, query = target.partition("?")
        lines = [f"{name}:{value}\n" for name, value in sorted(signed.items()) if name not in _NOT_SIGNED]
        names = ";".join(sorted(signed.keys() - _NOT_SIGNED))
        canonical = f"{method}\n{path}\n{query}\n{''.join(lines)}\n{names}\n{_UNSIGNED}"
        signature = self.signature(self.string_to_sign(stamp, canonical), stamp)
        head = [f"{method} {target} HTTP/1.1"]
        head.extend(f"{name}: {value}" for name, value in signed.items())
        head.append(
            f"authorization: AWS4-HMAC-SHA256 Credential={self.scope(stamp)}, SignedHeaders={names}, "
            f"Signature={signature}\r\n\r\n"
        )
        return "\r\n".join(head).encode("ascii")

    def signature(self, string_to_sign: str, request: _Stamp) -> str:
        day = request.context["timestamp"][:8]
        if day != self._day:
            key = f"AWS4{self.credentials.secret_key}".encode()
            for word in (day, self._region_name, self._service_name, "aws4_request"):
                key = self._sign(key, word)
            self._day, self._key = day, key
        return hmac.digest(self._key, string_to_sign.encode(), "sha256").hex()

    def _stamp_of(self, second: int) -> _Stamp:
        if second != self._second:
            timestamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(second))
            self._second, self._stamp = second, _Stamp({"timestamp": timestamp})
        return self._stamp


_NOT_SIGNED = frozenset({"content-length", "expect"})


def quote_key(key: str) -> str:
    """`key` as it stands in the path of a request and in its signature."""
    return quote(key, safe="/~")


def quote_query(parameters: Mapping[str, str]) -> str:
    """The query of a request in the order and spelling that are signed."""
    return "&".join(f"{quote(name, safe='-_.~')}={quote(parameters[name], safe='-_.~')}" for name in sorted(parameters))
