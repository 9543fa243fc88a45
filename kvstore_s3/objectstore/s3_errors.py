"""What an S3 client can raise, mapped to our errors. Pure: a decision about one exception, no I/O.

Messages carry S3's error code but never the server's own text, which may quote access keys or tokens.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    SSLError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError

from kvstore_s3.errors import (
    BitstreamFault,
    DamagedObjectError,
    KVStoreError,
    ObjectNotFoundError,
    StoreBusyError,
    StoreRefusedError,
    StoreUnavailableError,
)
from kvstore_s3.objectstore.http_message import Head, error_code, error_region, retry_after_s


class AnswerError(Exception):
    """The server answered a direct request with an error."""

    def __init__(self, head: Head, body: bytes) -> None:
        self.status = head.status
        self.code = error_code(body) or str(head.status)
        self.region = error_region(head, body)
        self.retry_after_s = retry_after_s(head.headers)
        super().__init__(f"{self.status} {self.code}")


class UnreachableError(ConnectionError):
    """No connection could be made."""


class TlsRefusedError(ssl.SSLError):
    """The handshake failed, or the certificate was not accepted."""


class ChangedWhileReadError(Exception):
    """The object was replaced while it was being read, and again while it was read once more."""


FOREIGN_ERRORS = (
    AnswerError,
    ChangedWhileReadError,
    ClientError,
    BotoCoreError,
    ResponseParserError,
    aiohttp.ClientError,
    TimeoutError,
    OSError,
)
"""All that a request may raise; nothing of it leaves this package."""


class ObjectExistsError(StoreRefusedError):
    """412: If-None-Match found an object. Internal: `put` answers False."""


class ConflictError(StoreUnavailableError):
    """409: another writer of the same key is at work. Internal: a multipart upload starts again from its Create."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a request was for, as error messages name it."""

    url: str
    endpoint: str


_CREDENTIALS = "give them by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile (AWS_PROFILE) or an instance role"
_PERMISSIONS = (
    "these credentials lack permission; s3:ListBucket, GetObject, PutObject, DeleteObject and AbortMultipartUpload are "
    "needed (without s3:ListBucket, S3 says this of every object that is not there)"
)
_UNKNOWN_KEY = f"the access key is not known there; {_CREDENTIALS}"
_EXPIRED = "the session token has expired; renew the credentials"
_REGION = "the bucket is in another region; set region"

_REFUSED: Mapping[str, str] = {
    "NoSuchBucket": "the bucket does not exist; create it or correct the store URL",
    "InvalidBucketName": "the server does not accept this bucket name; correct the store URL",
    "InvalidAccessKeyId": _UNKNOWN_KEY,
    "XAdminUserNotFound": _UNKNOWN_KEY,  # versitygw
    "SignatureDoesNotMatch": f"the secret key does not belong to the access key; {_CREDENTIALS}",
    "InvalidToken": "the session token is not valid; renew the credentials",
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestExpired": _EXPIRED,
    "RequestTimeTooSkewed": "this machine's clock and the server's differ by more than 15 minutes; set the clock",
    "AccessDenied": _PERMISSIONS,
    "AllAccessDisabled": _PERMISSIONS,
    "AccountProblem": _PERMISSIONS,
    "403": _PERMISSIONS,
    "Forbidden": _PERMISSIONS,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "301": _REGION,
    "NotImplemented": "the server does not implement this request; a server with If-None-Match on PUT is needed",
    "MethodNotAllowed": "the server does not allow this request; does endpoint_url name an S3 endpoint?",
}

_BUSY = frozenset(
    {
        "SlowDown",
        "SlowDownRead",  # MinIO
        "SlowDownWrite",
        "ServerBusy",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "RequestLimitExceeded",
        "BandwidthLimitExceeded",
    }
)
_PASSING = frozenset(
    {
        "RequestTimeout",
        "OperationAborted",
        "BadDigest",  # the body was damaged on its way
        "XAmzContentChecksumMismatch",
    }
)
_CHECKSUM_REFUSED = frozenset({"NotImplemented", "InvalidRequest", "InvalidArgument"})
_EXPIRED_CODES = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})
_GONE = frozenset({"NoSuchKey", "NoSuchUpload", "404", "NotFound"})


def map_error(error: Exception, target: Target) -> KVStoreError:
    """Return our error for one that a request raised (one of `FOREIGN_ERRORS`)."""
    if isinstance(error, ClientError | AnswerError):
        return _map_answer(*_code_and_status(error), target)
    where = f"{target.url}: {target.endpoint}"
    match error:
        case NoCredentialsError():
            return StoreRefusedError(f"{target.url}: no AWS credentials were found; {_CREDENTIALS}")
        case PartialCredentialsError() | CredentialRetrievalError() | ProfileNotFound():
            return StoreRefusedError(f"{target.url}: AWS credentials cannot be loaded; {_CREDENTIALS} [{_name(error)}]")
        case SSLError() | TlsRefusedError():
            return StoreRefusedError(
                f"{where} offers no valid TLS; use http:// if it has none, or set AWS_CA_BUNDLE to its authority"
            )
        case EndpointConnectionError() | ConnectTimeoutError() | UnreachableError():
            return StoreUnavailableError(f"{where} cannot be reached; is endpoint_url right and the server up?")
        case ReadTimeoutError() | TimeoutError():
            return StoreUnavailableError(f"{where} did not answer in time; is it overloaded?")
        case ChangedWhileReadError():
            return StoreUnavailableError(f"{where}: the object was replaced again and again while it was read")
        case BotoConnectionError() | HTTPClientError() | aiohttp.ClientError() | OSError():
            return StoreUnavailableError(f"{where} broke the connection off [{_name(error)}]")
        case ResponseParserError():
            return not_s3(target)
    return StoreRefusedError(f"{where}: the request cannot be made; is the AWS configuration right? [{_name(error)}]")


def not_s3(target: Target) -> StoreRefusedError:
    return StoreRefusedError(f"{target.url}: {target.endpoint} does not answer like an S3 server; correct endpoint_url")


def pause_asked_s(error: Exception) -> float:
    """For how many seconds the server asked to be left alone; 0 where it did not say."""
    if isinstance(error, ClientError):
        return retry_after_s(error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}))
    return error.retry_after_s if isinstance(error, AnswerError) else 0.0


def refuses_checksum(error: Exception) -> bool:
    """Whether a request with a checksum may have been refused for it: then it is worth one try without."""
    code, status = _code_and_status(error)
    return status == 501 or (status == 400 and code in _CHECKSUM_REFUSED)


def tells_expired(error: Exception) -> bool:
    """Whether the credentials were valid once: then it is worth looking for new ones."""
    return _code_and_status(error)[0] in _EXPIRED_CODES


def _code_and_status(error: Exception) -> tuple[str, int]:
    if isinstance(error, AnswerError):
        return error.code, error.status
    if not isinstance(error, ClientError):
        return "", 0
    response = error.response
    return str(response.get("Error", {}).get("Code", "")), int(
        response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    )


def _map_answer(code: str, status: int, target: Target) -> KVStoreError:
    where, label = f"{target.url} at {target.endpoint}", f"[{code or status}]"
    if code in _GONE:
        return ObjectNotFoundError(f"{where}: there is no such object {label}")
    if status == 412:
        return ObjectExistsError(f"{where}: the object exists {label}")
    if status == 416:
        return DamagedObjectError(
            BitstreamFault.TRUNCATED, f"{where}: the object ends before the range that was asked for"
        )
    if code in _BUSY or code in _PASSING or status == 429 or status >= 500:
        doubt = "" if code.isalpha() else " (and does not say so like an S3 server; is it one?)"
        kind = StoreBusyError if code in _BUSY or status == 429 else StoreUnavailableError
        return kind(f"{where}: the server is overloaded or in trouble{doubt}; try again later {label}")
    if status == 409:
        return ConflictError(f"{where}: another writer of this object is at work; try again {label}")
    advice = _REFUSED.get(code, "the server refused the request; are endpoint_url, bucket and credentials right?")
    return StoreRefusedError(f"{where}: {advice} {label}")


def _name(error: Exception) -> str:
    return type(error).__name__
