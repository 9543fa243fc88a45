"""Multipart uploads that nobody will complete: find them, abort them, and have the bucket do so by itself."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from botocore.exceptions import ClientError

from kvstore_s3.errors import KVStoreError, ObjectNotFoundError, StoreError, StoreRefusedError, StoreUnavailableError
from kvstore_s3.metrics import Count
from kvstore_s3.objectstore.awaiting import finish
from kvstore_s3.objectstore.s3_client import S3Client
from kvstore_s3.objectstore.upload_journal import DeadJournal, JournaledUpload, claim_dead

log = logging.getLogger("kvstore_s3")

JOURNALS = "uploads"
"""Folder of the journals, below the setting `cache_dir`."""

_YOUNG_S = 3600.0
_FORGOTTEN_S = 30 * 86400.0
"""Lines of stores that nobody opened again for so long are dropped."""
_NOT_OFFERED = frozenset({"NotImplemented", "MethodNotAllowed"})
_RULE = "kvstore-s3-abort-uploads"
_UNRESOLVED = "AWS"
"""What a journal names where the endpoint was AWS's own and not known yet; bucket names are unique there."""


class NoListingError(StoreRefusedError):
    """The server does not offer ListMultipartUploads, or not to these credentials."""


@dataclass(frozen=True, slots=True)
class PendingUpload:
    """An upload that was created, and neither completed nor aborted. `key` is that in the bucket."""

    key: str
    upload_id: str
    initiated: float
    """Seconds since 1970, by the server's clock."""


@dataclass(frozen=True, slots=True)
class SweptUpload:
    """What became of one upload."""

    upload: PendingUpload
    journaled: bool
    """Known from the journal of a process that died."""

    outcome: Literal["aborted", "young", "failed"]
    """In a dry run, "aborted" is what would be."""

    reason: str = ""


class S3Uploads:
    """The uploads below a store's prefix."""

    def __init__(self, client: S3Client, bucket: str, base: str) -> None:
        """`base` is what the store's keys begin with in the bucket: "" or a prefix with its "/"."""
        self._client = client
        self._bucket = bucket
        self._base = base

    async def list_uploads(self) -> AsyncIterator[PendingUpload]:
        """The uploads that the server lists below the store's prefix: on MinIO none."""
        async for upload in self._list(self._base):
            yield upload

    async def find_uploads(self, key: str) -> list[PendingUpload]:
        """The uploads of the bucket's `key`."""
        return [upload async for upload in self._list(key) if upload.key == key]

    async def _list(self, prefix: str) -> AsyncIterator[PendingUpload]:
        query: dict[str, object] = {"Bucket": self._bucket, "Prefix": prefix}
        while True:
            page = await self._read_page(query)
            for found in page.get("Uploads", ()):
                yield PendingUpload(found["Key"], found["UploadId"], found["Initiated"].timestamp())
            if not page.get("IsTruncated"):
                return
            query |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    async def _read_page(self, query: Mapping[str, object]) -> Mapping[str, Any]:
        try:
            return await self._client.call("list_multipart_uploads", query)
        except (StoreRefusedError, StoreUnavailableError) as error:
            if _code_of(error) in {*_NOT_OFFERED, "AccessDenied"}:
                message = f"uploads are not listed (s3:ListBucketMultipartUploads is needed on AWS): {error}"
                raise NoListingError(message) from error
            raise

    async def abort_upload(self, key: str, upload_id: str) -> bool:
        """Abort an upload of the bucket's `key`. False: it was gone already (MinIO does not tell)."""
        arguments = {"Bucket": self._bucket, "Key": key, "UploadId": upload_id}
        try:
            await self._client.call("abort_multipart_upload", arguments)
        except ObjectNotFoundError:
            return False
        return True

    async def abort_twins(self, key: str, upload_id: str, *, within_s: float) -> None:
        """Abort the uploads of the bucket's `key` that began up to `within_s` before the upload `upload_id` did.

        For a Create that was made again: an earlier attempt may have begun an upload and its answer was lost. Another
        writer that is at the same key in the same moment loses its upload, and begins anew.
        """
        found = await self.find_uploads(key)
        ours = next((upload.initiated for upload in found if upload.upload_id == upload_id), None)
        for upload in found:
            if ours is not None and upload.upload_id != upload_id and 0 <= ours - upload.initiated <= within_s:
                await self.abort_upload(key, upload.upload_id)

    async def set_upload_lifetime(self, days: int) -> bool:
        """Have the bucket abort uploads below the store's prefix `days` after they began. False: it did so already.

        The bucket's other lifecycle rules stay. Raises `StoreRefusedError` where the server takes no such rule (MinIO
        answers 400, and drops stale uploads by itself after a day).
        """
        found = await self._read_lifecycle()
        rule = {
            "ID": _RULE if not self._base else f"{_RULE}:{self._base}",
            "Status": "Enabled",
            "Filter": {"Prefix": self._base},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": days},
        }
        rules = list(found.get("Rules", ()))
        if rule in rules:
            return False
        kept = [other for other in rules if other.get("ID") != rule["ID"]]
        arguments = {"Bucket": self._bucket, "LifecycleConfiguration": {"Rules": [*kept, rule]}}
        if size := found.get("TransitionDefaultMinimumObjectSize"):
            arguments["TransitionDefaultMinimumObjectSize"] = size
        await self._client.call("put_bucket_lifecycle_configuration", arguments)
        return True

    async def _read_lifecycle(self) -> Mapping[str, Any]:
        try:
            return await self._client.call("get_bucket_lifecycle_configuration", {"Bucket": self._bucket})
        except (StoreRefusedError, StoreUnavailableError) as error:
            code = _code_of(error)
            if code == "NoSuchLifecycleConfiguration":
                return {}
            if code in _NOT_OFFERED:
                raise StoreRefusedError(f"the server has no lifecycle rules [{code}]") from error
            raise

    async def sweep_listed(self, *, older_than_s: float, dry_run: bool = False) -> list[SweptUpload]:
        """Abort what the server lists and was begun at least `older_than_s` ago: a living writer may own the rest."""
        return [
            await self._sweep(upload, older_than_s=older_than_s, dry_run=dry_run)
            async for upload in self.list_uploads()
        ]

    async def sweep_journals(self, folder: Path, *, older_than_s: float, dry_run: bool = False) -> list[SweptUpload]:
        """Abort what dead processes of this machine had under way, by their journals in `folder`.

        Another writer may be at the same key: of uploads whose id was not written down, those younger than
        `older_than_s` are left alone, and their line stays.
        """
        swept: list[SweptUpload] = []
        with claim_dead(folder) as journals:
            for journal in journals:
                for entry in list(journal.left.values()):
                    if self._owns(entry):
                        swept += await self._sweep_entry(journal, entry, older_than_s=older_than_s, dry_run=dry_run)
                    elif not dry_run and time.time() - entry.begun > _FORGOTTEN_S:
                        journal.settle(entry)
        return swept

    def _owns(self, entry: JournaledUpload) -> bool:
        here = (_UNRESOLVED, self._client.target.endpoint)
        return entry.bucket == self._bucket and entry.key.startswith(self._base) and entry.endpoint in here

    async def _sweep_entry(
        self, journal: DeadJournal, entry: JournaledUpload, *, older_than_s: float, dry_run: bool
    ) -> list[SweptUpload]:
        swept = []
        for upload in await self._find(entry):
            age = 0.0 if upload.upload_id == entry.upload_id else older_than_s
            swept.append(await self._sweep(upload, older_than_s=age, dry_run=dry_run, journaled=True))
        # Of an id that was not written down, the Create may be on its way still.
        certain = entry.upload_id is not None or time.time() - entry.begun >= older_than_s
        if certain and not dry_run and all(found.outcome == "aborted" for found in swept):
            journal.settle(entry)
        return swept

    async def _find(self, entry: JournaledUpload) -> list[PendingUpload]:
        """The uploads of the entry's key that are there, or the noted one where the server does not list."""
        try:
            return await self.find_uploads(entry.key)
        except NoListingError:
            if entry.upload_id is None:
                raise
            return [PendingUpload(entry.key, entry.upload_id, entry.begun)]

    async def _sweep(
        self, upload: PendingUpload, *, older_than_s: float, dry_run: bool, journaled: bool = False
    ) -> SweptUpload:
        if older_than_s and time.time() - upload.initiated < older_than_s:
            return SweptUpload(upload, journaled, "young")
        try:
            if not dry_run:
                await self.abort_upload(upload.key, upload.upload_id)
        except StoreError as error:
            return SweptUpload(upload, journaled, "failed", str(error))
        return SweptUpload(upload, journaled, "aborted")


class JournalSweep:
    """Aborts in the background, once, what dead processes of this machine left in a store."""

    def __init__(self, uploads: S3Uploads, folder: Path, count: Count) -> None:
        self._uploads = uploads
        self._folder = folder
        self._count = count
        self._task: asyncio.Task[None] | None = None

    def begin_once(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """End it. It can be cancelled anywhere: what is not struck out is swept the next time."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await finish(asyncio.wait([self._task]))

    async def _run(self) -> None:
        with suppress(KVStoreError):  # nobody waits for it; the store's own requests say what is wrong
            swept = await self._uploads.sweep_journals(self._folder, older_than_s=_YOUNG_S)
            aborted = sum(1 for found in swept if found.outcome == "aborted")
            if aborted:
                self._count("uploads_swept", aborted)
                log.info("%d unfinished uploads of dead processes were aborted", aborted)


def _code_of(error: StoreError) -> str:
    """S3's own name of the error that this one was made from."""
    cause = error.__cause__
    return str(cause.response["Error"]["Code"]) if isinstance(cause, ClientError) else ""
