"""What an S3 client can raise, mapped to our errors. Pure: a decision about one exception, no I/O.

Messages carry S3's error code but never the server's own text, which may quote access keys or tokens.
"""

from __future__ import annotations

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
    StoreRefusedError,
    StoreUnavailableError,
)

FOREIGN_ERRORS = (ClientError, BotoCoreError, ResponseParserError, aiohttp.ClientError, TimeoutError, OSError)
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

_BUSY = frozenset({"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "OperationAborted"})
_GONE = frozenset({"NoSuchKey", "NoSuchUpload", "404", "NotFound"})


def map_error(error: Exception, target: Target) -> KVStoreError:
    """Return our error for one that a request raised (one of `FOREIGN_ERRORS`)."""
    if isinstance(error, ClientError):
        return _map_answer(error, target)
    where = f"{target.url}: {target.endpoint}"
    match error:
        case NoCredentialsError():
            return StoreRefusedError(f"{target.url}: no AWS credentials were found; {_CREDENTIALS}")
        case PartialCredentialsError() | CredentialRetrievalError() | ProfileNotFound():
            return StoreRefusedError(f"{target.url}: AWS credentials cannot be loaded; {_CREDENTIALS} [{_name(error)}]")
        case SSLError():
            return StoreRefusedError(
                f"{where} offers no valid TLS; use http:// if it has none, or set AWS_CA_BUNDLE to its authority"
            )
        case EndpointConnectionError() | ConnectTimeoutError():
            return StoreUnavailableError(f"{where} cannot be reached; is endpoint_url right and the server up?")
        case ReadTimeoutError() | TimeoutError():
            return StoreUnavailableError(f"{where} did not answer in time; is it overloaded?")
        case BotoConnectionError() | HTTPClientError() | aiohttp.ClientError() | OSError():
            return StoreUnavailableError(f"{where} broke the connection off [{_name(error)}]")
        case ResponseParserError():
            return not_s3(target)
    return StoreRefusedError(f"{where}: the request cannot be made; is the AWS configuration right? [{_name(error)}]")


def not_s3(target: Target) -> StoreRefusedError:
    return StoreRefusedError(f"{target.url}: {target.endpoint} does not answer like an S3 server; correct endpoint_url")


def _map_answer(error: ClientError, target: Target) -> KVStoreError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    where, label = f"{target.url} at {target.endpoint}", f"[{code or status}]"
    if code in _GONE:
        return ObjectNotFoundError(f"{where}: there is no such object {label}")
    if status == 412:
        return ObjectExistsError(f"{where}: the object exists {label}")
    if status == 416:
        return DamagedObjectError(
            BitstreamFault.TRUNCATED, f"{where}: the object ends before the range that was asked for"
        )
    if code in _BUSY or status == 429 or status >= 500:
        doubt = "" if code.isalpha() else " (and does not say so like an S3 server; is it one?)"
        return StoreUnavailableError(f"{where}: the server is overloaded or in trouble{doubt}; try again later {label}")
    if status == 409:
        return ConflictError(f"{where}: another writer of this object is at work; try again {label}")
    advice = _REFUSED.get(code, "the server refused the request; are endpoint_url, bucket and credentials right?")
    return StoreRefusedError(f"{where}: {advice} {label}")


def _name(error: Exception) -> str:
    return type(error).__name__
