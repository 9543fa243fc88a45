"""gc --uploads: remove what writers that died left behind, unfinished uploads and temporary files."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from kvstore_s3.cli import exits
from kvstore_s3.cli.options import require_store
from kvstore_s3.cli.output import Report, count_noun
from kvstore_s3.errors import InvalidArgumentError, StoreRefusedError
from kvstore_s3.objectstore.local import LocalStore
from kvstore_s3.objectstore.open import open_store

if TYPE_CHECKING:
    from kvstore_s3.config import Settings
    from kvstore_s3.objectstore.base import ObjectStore
    from kvstore_s3.objectstore.s3_uploads import S3Uploads, SweptUpload

LIFETIME_DAYS = 1
"""After so many days the lifecycle rule has the bucket abort an upload."""

_AGE = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)([smhd]?)", re.ASCII)
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class GcOptions:
    uploads: bool
    older_than: str = "1h"
    lifecycle: bool = False
    dry_run: bool = False


@dataclass(slots=True)
class Swept:
    """What a sweep did. `problems` are steps that the server refused."""

    uploads: list[SweptUpload] = field(default_factory=list)
    temporaries: int = 0
    lifecycle: str | None = None
    problems: list[str] = field(default_factory=list)


def collect_garbage(options: GcOptions, settings: Settings) -> Report:
    """Sweep the store of `settings`. Raises `InvalidArgumentError` where `options` say nothing to do."""
    if not options.uploads:
        raise InvalidArgumentError("gc: say what to remove; there is --uploads, for what interrupted writers left")
    age_s = parse_age(options.older_than)
    return asyncio.run(_collect(options, age_s, settings))


def parse_age(text: str) -> float:
    """Seconds of "90", "90s", "30m", "1h" or "2d". Raises `InvalidArgumentError`."""
    match = _AGE.fullmatch(text)
    if match is None:
        raise InvalidArgumentError(f"--older-than: expected a time such as 90s, 30m, 1h or 2d, not {text!r}")
    return float(match[1]) * _UNITS[match[2]]


async def _collect(options: GcOptions, age_s: float, settings: Settings) -> Report:
    url = require_store(settings)
    store = open_store(url, settings)
    try:
        swept = await _sweep(store, options, age_s, settings)
    finally:
        await store.close()
    return _report(store.url, swept, dry_run=options.dry_run)


async def _sweep(store: ObjectStore, options: GcOptions, age_s: float, settings: Settings) -> Swept:
    if options.lifecycle and not store.url.startswith("s3://"):
        raise InvalidArgumentError(f"--lifecycle is a rule of buckets; {store.url} needs none: leave it out")
    if isinstance(store, LocalStore):
        return Swept(temporaries=await store.sweep(dry_run=options.dry_run))
    from kvstore_s3.objectstore.s3 import S3Store

    if not isinstance(store, S3Store):
        return Swept()  # memory:// has neither
    return await _sweep_bucket(store.uploads, options, age_s, settings)


async def _sweep_bucket(uploads: S3Uploads, options: GcOptions, age_s: float, settings: Settings) -> Swept:
    from kvstore_s3.objectstore.s3_uploads import JOURNALS, NoListingError

    swept = Swept()
    try:
        swept.uploads += await uploads.sweep_listed(older_than_s=age_s, dry_run=options.dry_run)
    except NoListingError as error:
        swept.problems.append(f"journals alone were followed: {error}")
    found = await uploads.sweep_journals(settings.cache_dir / JOURNALS, older_than_s=age_s, dry_run=options.dry_run)
    known = {upload.upload.upload_id for upload in swept.uploads}
    swept.uploads += [upload for upload in found if upload.upload.upload_id not in known]
    if options.lifecycle:
        await _set_lifecycle(uploads, swept, dry_run=options.dry_run)
    return swept


async def _set_lifecycle(uploads: S3Uploads, swept: Swept, *, dry_run: bool) -> None:
    if dry_run:
        swept.lifecycle = "not set (dry run)"
        return
    try:
        swept.lifecycle = "set" if await uploads.set_upload_lifetime(LIFETIME_DAYS) else "set before"
    except StoreRefusedError as error:
        swept.lifecycle = "refused"
        swept.problems.append(
            f"the server takes no lifecycle rule for uploads (MinIO does not, but drops them by itself after a day): "
            f"{error}"
        )


def _report(url: str, swept: Swept, *, dry_run: bool) -> Report:
    by_outcome: dict[str, list[dict[str, Any]]] = {"aborted": [], "young": [], "failed": []}
    for found in swept.uploads:
        by_outcome[found.outcome].append(_describe(found))
    data = {
        "store": url,
        "dry_run": dry_run,
        "aborted": by_outcome["aborted"],
        "kept": by_outcome["young"],
        "failed": by_outcome["failed"],
        "temporaries": swept.temporaries,
        "lifecycle": swept.lifecycle,
        "problems": swept.problems,
    }
    failed = bool(by_outcome["failed"] or swept.problems)
    return Report(data, _lines(swept, dry_run=dry_run), exits.SOME_FAILED if failed else exits.DONE)


def _describe(found: SweptUpload) -> dict[str, Any]:
    upload = found.upload
    begun = datetime.fromtimestamp(upload.initiated, UTC).isoformat(timespec="seconds")
    shown = {"key": upload.key, "upload": upload.upload_id, "initiated": begun, "journaled": found.journaled}
    return {**shown, "reason": found.reason} if found.reason else shown


def _lines(swept: Swept, *, dry_run: bool) -> Sequence[str]:
    would = "would be " if dry_run else ""
    words = {"aborted": f"{would}aborted", "young": "kept, begun lately", "failed": "not aborted"}
    lines = [
        f"{words[found.outcome]}: {found.upload.key}" + (f": {found.reason}" if found.reason else "")
        for found in swept.uploads
    ]
    aborted = sum(1 for found in swept.uploads if found.outcome == "aborted")
    lines.append(f"{count_noun(aborted, 'unfinished upload')} {would}aborted")
    if swept.temporaries:
        lines.append(f"{count_noun(swept.temporaries, 'temporary file')} {would}removed")
    if swept.lifecycle is not None:
        lines.append(f"lifecycle rule (uploads end after {count_noun(LIFETIME_DAYS, 'day')}): {swept.lifecycle}")
    return [*lines, *swept.problems]
