"""Multipart upload: parts in flight within a bound, complete if absent, and an abort whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from kvstore_s3.errors import KVStoreError, ObjectNotFoundError, StoreError, StoreRefusedError, StoreUnavailableError
from kvstore_s3.objectstore.awaiting import finish
from kvstore_s3.objectstore.direct import Answer
from kvstore_s3.objectstore.s3_client import S3Client
from kvstore_s3.objectstore.s3_errors import ConflictError, ObjectExistsError
from kvstore_s3.objectstore.s3_uploads import S3Uploads
from kvstore_s3.objectstore.upload_journal import Note, UploadJournal

_MiB = 1024 * 1024
_MAX_PARTS = 10_000
_MOMENT_S = 0.5
_ABORTING_S = 5.0
"""A store that is closed waits for so long until its uploads are aborted."""
_OF_A_PART = ("ETag", "ChecksumCRC32C")
"""What Complete must repeat of the server's answer to a part."""


class Part(NamedTuple):
    """One part to upload: S3 counts from 1; `data` is a view of the caller's buffer."""

    number: int
    data: memoryview


def split_parts(data: memoryview, part_bytes: int) -> Iterator[Part]:
    """Cut `data` into parts of `part_bytes`, or larger ones (whole MiB) where S3's limit of 10,000 calls for it."""
    least = -(-len(data) // _MAX_PARTS)
    size = part_bytes if least <= part_bytes else -(-least // _MiB) * _MiB
    for number, begin in enumerate(range(0, len(data), size), start=1):
        yield Part(number, data[begin : begin + size])


class MultipartUpload:
    """Uploads objects in parts. `slots` bounds the parts in flight, and with them the memory, over all uploads.

    `journal` knows of each upload before the server does, until nothing of it is left there.
    """

    def __init__(
        self,
        client: S3Client,
        uploads: S3Uploads,
        slots: asyncio.Semaphore,
        journal: UploadJournal,
        *,
        part_bytes: int,
        workers: int,
        attempts: int,
    ) -> None:
        self._client = client
        self._uploads = uploads
        self._journal = journal
        self._slots = slots
        self._part_bytes = part_bytes
        self._workers = workers
        self._attempts = attempts
        self._under_way: set[asyncio.Task[bool]] = set()

    async def put(
        self, name: Mapping[str, str], data: memoryview, metadata: Mapping[str, str], *, replace: bool
    ) -> bool:
        """Upload `data` to `name` (Bucket and Key). False where the object exists and is to be left alone."""
        upload = asyncio.create_task(self._put(name, data, metadata, replace=replace))
        self._under_way.add(upload)
        upload.add_done_callback(self._under_way.discard)
        return await finish(upload, on_cancel=upload.cancel)

    async def close(self) -> None:
        """End what is under way and abort it, if the server answers soon; the journal knows what is left."""
        for upload in self._under_way:
            upload.cancel()
        if self._under_way:
            await finish(asyncio.wait(set(self._under_way), timeout=_ABORTING_S))

    async def _put(
        self, name: Mapping[str, str], data: memoryview, metadata: Mapping[str, str], *, replace: bool
    ) -> bool:
        for _ in range(self._attempts - 1):
            try:
                return await self._put_once(name, data, metadata, replace=replace)
            except ConflictError:
                continue  # S3 wants the whole upload again, from its Create
        return await self._put_once(name, data, metadata, replace=replace)

    async def _put_once(
        self, name: Mapping[str, str], data: memoryview, metadata: Mapping[str, str], *, replace: bool
    ) -> bool:
        async with self._journal.upload(name["Bucket"], name["Key"], self._client.target.endpoint) as note:
            upload = {**name, "UploadId": await self._create(name, metadata, note)}
            try:
                await self._note(upload, note)
                parts = await self._upload_parts(upload, data)
                created = await self._complete(upload, parts, replace=replace)
                note.settle()
            except ObjectExistsError:
                await finish(self._abort(upload, note))
                return False
            except ObjectNotFoundError as error:  # a part found the upload gone: aborted by somebody's janitor
                note.settle()
                raise ConflictError(str(error)) from error
            except BaseException:  # cancelled, too: what was begun must be aborted before anyone hears of it
                await finish(self._abort(upload, note))
                raise
        return created

    async def _create(self, name: Mapping[str, str], metadata: Mapping[str, str], note: Note) -> str:
        """Begin an upload. It is awaited to its end: a cancelled request might leave an upload without a known id."""
        arguments: dict[str, object] = {**name, "Metadata": metadata}
        if self._client.checksums:
            arguments["ChecksumAlgorithm"] = "CRC32C"  # or S3 would refuse the checksums of the parts
        task = asyncio.ensure_future(self._client.call("create_multipart_upload", arguments, on_retry=note.doubt))
        try:
            return str((await finish(task))["UploadId"])
        except asyncio.CancelledError:
            if not task.cancelled() and task.exception() is None:
                await finish(self._abort({**name, "UploadId": str(task.result()["UploadId"])}, note))
            raise
        except (StoreRefusedError, ObjectNotFoundError):
            note.settle()
            raise

    async def _note(self, upload: Mapping[str, str], note: Note) -> None:
        await note.begun(upload["UploadId"])
        if note.doubtful:
            with suppress(StoreError):  # the upload itself does not need it; the line stays in the journal
                await self._uploads.abort_twins(upload["Key"], upload["UploadId"], within_s=self._client.deadline_s)
                note.trust()

    async def _upload_parts(self, upload: Mapping[str, str], data: memoryview) -> list[dict[str, object]]:
        pending = split_parts(data, self._part_bytes)
        done: dict[int, dict[str, object]] = {}

        async def work() -> None:
            for part in pending:
                async with self._slots:
                    arguments = {**upload, "PartNumber": part.number}
                    answer = await _end_softly(self._client.call("upload_part", arguments, body=part.data))
                done[part.number] = {name: answer[name] for name in _OF_A_PART if name in answer}

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._workers, -(-len(data) // self._part_bytes))):
                    group.create_task(work())
        except BaseExceptionGroup as failed:
            raise _first(failed) from failed
        return [{"PartNumber": number, **done[number]} for number in sorted(done)]

    async def _complete(self, upload: Mapping[str, str], parts: list[dict[str, object]], *, replace: bool) -> bool:
        arguments: dict[str, object] = {**upload, "MultipartUpload": {"Parts": parts}}
        if not replace:
            arguments["IfNoneMatch"] = "*"
        try:
            await self._client.call("complete_multipart_upload", arguments, retry_conflict=False)
        except ObjectNotFoundError as error:
            # The upload is gone: aborted by somebody's janitor, or completed by an attempt whose answer was lost.
            if replace:
                raise ConflictError(str(error)) from error
            return await self._find(upload, error)
        return True

    async def _find(self, upload: Mapping[str, str], gone: ObjectNotFoundError) -> bool:
        try:
            await self._client.call("head_object", {"Bucket": upload["Bucket"], "Key": upload["Key"]})
        except ObjectNotFoundError:
            raise ConflictError(str(gone)) from gone
        return True

    async def _abort(self, upload: Mapping[str, str], note: Note) -> None:
        try:
            await self._uploads.abort_upload(upload["Key"], upload["UploadId"])
        except (StoreUnavailableError, StoreRefusedError):
            return  # the server is gone: whoever sweeps the journal, or the bucket's lifecycle rule, must do it
        note.settle()


async def _end_softly(request: Coroutine[Any, Any, Answer]) -> Answer:
    """Await the upload of a part; a cancelled one may end by itself for a moment.

    A server that has all of a part may still be storing it when the abort arrives, and then keep it.
    """
    task = asyncio.ensure_future(request)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        try:
            await asyncio.wait([task], timeout=_MOMENT_S)
        finally:
            task.cancel()
            await finish(asyncio.gather(task, return_exceptions=True))
        raise


def _first(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to report of several tasks that failed at once: one of ours before any other."""
    ours, others = failed.split(KVStoreError)
    leaf: BaseException | None = ours if ours is not None else others
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return leaf or failed
