"""Multipart uploads that nobody will complete: find them, abort them, and have the bucket do so by itself."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from botocore.exceptions import ClientError

from kvstore_s3.config import Settings
from kvstore_s3.errors import ObjectNotFoundError, StoreError, StoreRefusedError, StoreUnavailableError
from kvstore_s3.objectstore.s3_client import S3Client
from kvstore_s3.objectstore.upload_journal import DeadJournal, JournaledUpload, claim_dead

_RULE = "kvstore-s3-abort-uploads"
_UNRESOLVED = "AWS"
"""What a journal names where the endpoint was AWS's own and not known yet; bucket names are unique there."""


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
    """The uploads below a store's prefix. `close` is for those made by `open`, whose client is theirs alone."""

    def __init__(self, client: S3Client, bucket: str, base: str) -> None:
        """`base` is what the store's keys begin with in the bucket: "" or a prefix with its "/"."""
        self._client = client
        self._bucket = bucket
        self._base = base

    @classmethod
    def open(cls, url: str, settings: Settings) -> S3Uploads:
        """Those of s3://bucket/prefix, a URL that `open_store` accepts."""
        bucket, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
        return cls(S3Client(url, settings), bucket, f"{prefix}/" if prefix else "")

    async def close(self) -> None:
        await self._client.close()

    async def list_uploads(self, prefix: str = "") -> AsyncIterator[PendingUpload]:
        """Uploads whose key below the store's prefix starts with `prefix`; on MinIO, of that very key alone."""
        query: dict[str, object] = {"Bucket": self._bucket, "Prefix": self._base + prefix}
        while True:
            page = await self._client.call("list_multipart_uploads", query)
            for found in page.get("Uploads", ()):
                yield PendingUpload(found["Key"], found["UploadId"], found["Initiated"].timestamp())
            if not page.get("IsTruncated"):
                return
            query |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    async def abort_upload(self, key: str, upload_id: str) -> bool:
        """Abort an upload of the bucket's `key`. False: it was gone already (MinIO does not tell)."""
        arguments = {"Bucket": self._bucket, "Key": key, "UploadId": upload_id}
        try:
            await self._client.call("abort_multipart_upload", arguments)
        except ObjectNotFoundError:
            return False
        return True

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
            if code == "NotImplemented":
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
                for entry in [entry for entry in journal.left.values() if self._owns(entry)]:
                    swept += await self._sweep_entry(journal, entry, older_than_s=older_than_s, dry_run=dry_run)
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
            listed = [upload async for upload in self.list_uploads(entry.key.removeprefix(self._base))]
        except StoreRefusedError:
            if entry.upload_id is None:
                raise
            return [PendingUpload(entry.key, entry.upload_id, entry.begun)]
        return [upload for upload in listed if upload.key == entry.key]

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


def _code_of(error: StoreError) -> str:
    """S3's own name of the error that this one was made from."""
    cause = error.__cause__
    return str(cause.response["Error"]["Code"]) if isinstance(cause, ClientError) else ""
