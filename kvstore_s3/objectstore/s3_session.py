"""An aiobotocore client with what belongs to it: credentials, region, and the way to a direct data plane."""

from __future__ import annotations

import ssl
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import NoCredentialsError
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

from kvstore_s3.config import Settings
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.objectstore.direct_route import PLACEHOLDER, NoRouteError, Route, read_route
from kvstore_s3.objectstore.signing import Credentials

_DEFAULT_REGION = "us-east-1"


@dataclass(frozen=True, slots=True, eq=False)
class S3Session:
    """A client of the AWS SDK, and where its credentials come from."""

    client: Any
    region: str
    _session: Any

    async def credentials(self) -> Credentials:
        """The credentials to sign with now; those that expire are renewed in time. Raises NoCredentialsError."""
        return await _freeze_credentials(self._session)

    async def find_route(self, bucket: str) -> Route:
        """Return where the objects of `bucket` are. Raises NoRouteError where only the client itself gets there."""
        url = await self.client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": PLACEHOLDER})
        scheme = url.partition(":")[0]
        if get_environ_proxies(url).keys() & {scheme, "all"}:
            raise NoRouteError("the environment names a proxy for it")
        return read_route(url)

    def tls_context(self) -> ssl.SSLContext:
        """Verification against the system's authorities and botocore's, or those of AWS_CA_BUNDLE alone."""
        bundle = self._session.get_config_variable("ca_bundle")
        try:
            context = ssl.create_default_context(cafile=bundle)
            if not bundle:
                context.load_verify_locations(cafile=get_cert_path(True))
        except (OSError, ssl.SSLError) as error:
            raise InvalidArgumentError(f"the certificates in {bundle or 'the AWS client'} cannot be read") from error
        context.set_alpn_protocols(["http/1.1"])
        return context


async def look_up_credentials() -> Credentials:
    """What the AWS chain says now, regardless of what it said before. Raises NoCredentialsError."""
    return await _freeze_credentials(get_session())


async def _freeze_credentials(session: Any) -> Credentials:
    found = await session.get_credentials()
    if found is None:
        raise NoCredentialsError
    frozen: Credentials = await found.get_frozen_credentials()
    return frozen


async def open_session(url: str, settings: Settings, region: str | None, stack: AsyncExitStack) -> S3Session:
    """Make a client that `stack` closes. `region`: None for the settings', the AWS chain's, or the default one."""
    session = get_session()
    region = region or settings.region or session.get_config_variable("region") or _DEFAULT_REGION
    connections = max(settings.download_concurrency, settings.lookup_concurrency, settings.upload_concurrency)
    config = AioConfig(
        connect_timeout=settings.connect_timeout_s,
        read_timeout=settings.read_timeout_s,
        max_pool_connections=connections,
        retries={"total_max_attempts": 1},  # S3Client retries, so that bodies are covered too
        signature_version="s3v4",
        s3={
            "addressing_style": "path" if settings.path_style else "virtual",
            # Sections carry their own checksums: hashing payloads once more would cost more CPU than all the rest.
            "payload_signing_enabled": False,
        },
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    context = session.create_client("s3", region_name=region, endpoint_url=settings.endpoint_url, config=config)
    try:
        client = await stack.enter_async_context(context)
    except ValueError as error:
        raise InvalidArgumentError(f"{url}: the endpoint or region is not valid: {error}") from error
    return S3Session(client, region, session)
