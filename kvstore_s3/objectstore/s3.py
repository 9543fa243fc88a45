"""s3://bucket/prefix: S3 and servers that speak it.

Keys lie below the prefix. Credentials come from the default AWS chain and appear in no message.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping

from kvstore_s3.config import Settings
from kvstore_s3.errors import (
    BitstreamFault,
    DamagedObjectError,
    ObjectNotFoundError,
    StoreBusyError,
    StoreError,
    StoreUnavailableError,
)
from kvstore_s3.metrics import Count, ignore
from kvstore_s3.objectstore.base import (
    Buffer,
    ObjectInfo,
    check_key,
    check_metadata,
    check_prefix,
    is_key,
    view_source,
    view_target,
)
from kvstore_s3.objectstore.direct_exchange import Download
from kvstore_s3.objectstore.s3_client import S3Client
from kvstore_s3.objectstore.s3_errors import ObjectExistsError, not_s3
from kvstore_s3.objectstore.s3_multipart import MultipartUpload
from kvstore_s3.objectstore.s3_uploads import JOURNALS, JournalSweep, S3Uploads
from kvstore_s3.objectstore.upload_journal import UploadJournal

_BUCKET_TRUST_S = 60.0
"""For so long after the bucket was seen, a bodyless 404 is a missing object and not a missing bucket."""


class S3Store:
    """An `ObjectStore` in a bucket, below `prefix` ("" for none)."""

    def __init__(self, bucket: str, prefix: str, settings: Settings, count: Count = ignore) -> None:
        self._bucket = bucket
        self._base = f"{prefix}/" if prefix else ""
        self._multipart_bytes = settings.multipart_bytes
        self._client = S3Client(self.url, settings, count)
        self._slots = asyncio.Semaphore(settings.upload_concurrency)
        self.uploads = S3Uploads(self._client, bucket, self._base)
        self._journal = UploadJournal(settings.cache_dir / JOURNALS)
        self._sweep = JournalSweep(self.uploads, settings.cache_dir / JOURNALS, count)
        self._multipart = MultipartUpload(
            self._client,
            self.uploads,
            self._slots,
            self._journal,
            part_bytes=settings.multipart_bytes,
            workers=settings.upload_concurrency,
            attempts=settings.max_attempts,
        )
        self._probing = asyncio.Lock()
        self._bucket_seen: float | None = None

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._base}".removesuffix("/")

    async def probe(self) -> None:
        # A listing, because a refused HEAD has no body that would say why.
        query = {"Bucket": self._bucket, "Prefix": self._base, "MaxKeys": 1}
        if "Name" not in await self._client.call("list_objects_v2", query):
            raise not_s3(self._client.target)  # well-formed, but a web page
        self._bucket_seen = time.monotonic()
        self._sweep.begin_once()

    async def put(
        self, key: str, data: Buffer, *, metadata: Mapping[str, str] | None = None, replace: bool = False
    ) -> bool:
        name = self._name(key)
        source, kept = view_source(data), check_metadata(metadata)
        if len(source) <= self._multipart_bytes:
            return await self._put_whole(key, name, source, kept, replace=replace)
        if not replace and await self.head(key) is not None:
            return False  # Complete would find out too, but after all the bytes were sent
        return await self._multipart.put(name, source, kept, replace=replace)

    async def head(self, key: str) -> ObjectInfo | None:
        try:
            answer = await self._client.call("head_object", self._name(key))
        except ObjectNotFoundError:
            await self._confirm_bucket()
            return None
        self._bucket_seen = time.monotonic()
        return ObjectInfo(key, int(answer["ContentLength"]), dict(answer["Metadata"]))

    async def get_range(self, key: str, start: int, into: memoryview) -> None:
        name, target = self._name(key), view_target(start, into)
        if not target:
            return await self._check_start(key, start)
        await self._client.call("get_object", name, download=Download(key, start, target))
        return None

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        query = {"Bucket": self._bucket, "Prefix": self._base + check_prefix(prefix)}
        while True:
            page = await self._client.call("list_objects_v2", query)
            for found in page.get("Contents", ()):
                key = found["Key"].removeprefix(self._base)
                if is_key(key):
                    yield ObjectInfo(key, int(found["Size"]))
            if not page.get("IsTruncated"):
                return
            query["ContinuationToken"] = page["NextContinuationToken"]

    async def delete(self, key: str) -> None:
        try:
            await self._client.call("delete_object", self._name(key))
        except ObjectNotFoundError:
            await self._confirm_bucket()

    async def close(self) -> None:
        await self._sweep.close()
        await self._multipart.close()
        await self._client.close()
        await self._journal.close()

    def _name(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._base + check_key(key)}

    async def _put_whole(
        self, key: str, name: Mapping[str, str], source: memoryview, metadata: dict[str, str], *, replace: bool
    ) -> bool:
        arguments: dict[str, object] = {**name, "Metadata": metadata}
        if not replace:
            arguments["IfNoneMatch"] = "*"
        async with self._slots:
            try:
                await self._client.call("put_object", arguments, body=source)
            except ObjectExistsError:
                return False
            except StoreUnavailableError as error:
                # A server may close the connection on a body that it does not want, and its answer is lost with it.
                if replace or isinstance(error, StoreBusyError) or not await self._is_there(key):
                    raise
                return False
        return True

    async def _is_there(self, key: str) -> bool:
        try:
            return await self.head(key) is not None
        except StoreError:
            return False

    async def _check_start(self, key: str, start: int) -> None:
        """An empty range cannot be asked for; it is there if the object reaches up to its start."""
        info = await self.head(key)
        if info is None:
            raise ObjectNotFoundError(f"{self.url}: there is no object {key}")
        if info.size < start:
            raise DamagedObjectError(
                BitstreamFault.TRUNCATED, f"{self.url}: {key} ends at byte {info.size}, {start} were expected"
            )

    async def _confirm_bucket(self) -> None:
        """Raise if the bucket is gone: the 404 of a HEAD does not tell a missing object from a missing bucket."""
        async with self._probing:
            seen = self._bucket_seen
            if seen is None or time.monotonic() - seen > _BUCKET_TRUST_S:
                await self.probe()
