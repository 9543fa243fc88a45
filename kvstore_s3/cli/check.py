"""check: read every object, verify that it is what was saved under its name, and remove what is not if asked to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from kvstore_s3.calibrations import artefact_key, current_key, parse_artefact, read_artefact, read_current
from kvstore_s3.cli import exits
from kvstore_s3.cli.inventory import (
    NAMESPACE_JSON,
    NamespaceTotals,
    ObjectName,
    check_prefix,
    choose_namespace,
    open_objects,
    parse_name,
    take_inventory,
)
from kvstore_s3.cli.output import Report, count_noun, format_bytes, format_seconds, say
from kvstore_s3.cli.progress import WorkProgress
from kvstore_s3.cli.verify import decode_sections, expect_identity, read_header, verify_sections
from kvstore_s3.errors import DamagedObjectError, InvalidArgumentError, ObjectNotFoundError
from kvstore_s3.objectstore.base import ObjectInfo, ObjectStore
from kvstore_s3.shards import marker_key
from kvstore_s3.transfer.buffers import SlabPool

if TYPE_CHECKING:
    from kvstore_s3.codec.calibration import Calibration
    from kvstore_s3.config import Settings


Artefacts: TypeAlias = "dict[bytes, Calibration | None]"
"""Digests of a namespace's sound calibrations; with them the calibrations, where they are needed for decoding."""


@dataclass(frozen=True, slots=True)
class Damage:
    object: str
    fault: str
    reason: str


@dataclass(slots=True)
class Findings:
    """What a check has found so far. `lacking` are objects that nobody can decode: their calibration is not there.

    `unmarked` are missing markers of shards: other partitions do not look for these.
    """

    objects: int = 0
    bytes: int = 0
    calibrations: int = 0
    lacking: list[str] = field(default_factory=list)
    unmarked: list[str] = field(default_factory=list)
    vanished: int = 0
    unverifiable: int = 0
    damaged: list[Damage] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)


def check_store(settings: Settings, prefix: str | None, *, delete: bool, decode: bool) -> Report:
    """Verify all objects of a store, or of the namespace that starts with `prefix`."""
    return asyncio.run(_check_store(settings, check_prefix(prefix), delete=delete, decode=decode))


async def _check_store(settings: Settings, prefix: str, *, delete: bool, decode: bool) -> Report:
    start = time.monotonic()
    findings = Findings()
    async with open_objects(settings) as objects:
        namespaces, foreign = await take_inventory(objects, prefix)
        if prefix:
            chosen = choose_namespace(namespaces, prefix)
            namespaces = {chosen: namespaces[chosen]}
        _check_namespaces(namespaces, findings)
        total = sum(totals.objects for totals in namespaces.values())
        calibrations = {
            totals.hex: await _check_calibrations(objects, totals, findings, keep=decode)
            for totals in namespaces.values()
        }
        with WorkProgress("check", total, "object") as progress:
            checker = _Checker(objects, settings, findings, progress, calibrations, decode=decode)
            await checker.check_all(namespaces, prefix)
        if delete:
            await _delete_damaged(objects, findings)
        return _report(objects.url, namespaces, findings, foreign, time.monotonic() - start)


class _Checker:
    """Workers that take objects from one bounded queue, so that memory does not grow with the store.

    `calibrations` are the sound ones of each namespace.
    """

    def __init__(
        self,
        objects: ObjectStore,
        settings: Settings,
        findings: Findings,
        progress: WorkProgress,
        calibrations: dict[str, Artefacts],
        *,
        decode: bool,
    ) -> None:
        self._objects = objects
        self._findings = findings
        self._progress = progress
        self._calibrations = calibrations
        self._decode = decode
        self._workers = settings.download_concurrency
        self._slabs = SlabPool(settings.buffer_bytes, pin=False)

    async def check_all(self, namespaces: dict[str, NamespaceTotals], prefix: str) -> None:
        queue: asyncio.Queue[tuple[ObjectName, ObjectInfo] | None] = asyncio.Queue(self._workers)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._workers):
                    group.create_task(self._work(queue, namespaces))
                async for found in _list_chunks(self._objects, namespaces, prefix):
                    await queue.put(found)
                for _ in range(self._workers):
                    await queue.put(None)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _work(
        self, queue: asyncio.Queue[tuple[ObjectName, ObjectInfo] | None], namespaces: dict[str, NamespaceTotals]
    ) -> None:
        while (found := await queue.get()) is not None:
            name, info = found
            await self._check_object(name, info, namespaces[name.namespace])
            self._progress.advance(1)

    async def _check_object(self, name: ObjectName, info: ObjectInfo, totals: NamespaceTotals) -> None:
        if totals.namespace is None:
            self._findings.unverifiable += 1
            return
        try:
            identity = expect_identity(name, totals.namespace)
            header = await read_header(self._objects, info, identity)
            sound = self._calibrations[name.namespace]
            lacking = header.calibration is not None and header.calibration not in sound
            if self._decode and not lacking:
                calibration = sound[header.calibration] if header.calibration else None
                await decode_sections(self._objects, info, header, self._slabs, calibration)
            else:
                await verify_sections(self._objects, info, header, self._slabs)
            if lacking:  # and sound otherwise: what is damaged is listed as that
                self._findings.lacking.append(info.key)
        except ObjectNotFoundError:
            self._findings.vanished += 1
            return
        except DamagedObjectError as error:
            damage = Damage(info.key, error.code.name, str(error))
            self._findings.damaged.append(damage)
            self._progress.say(f"damaged: {damage.object}: {damage.reason}")
        self._findings.objects += 1
        self._findings.bytes += info.size


async def _list_chunks(
    objects: ObjectStore, namespaces: dict[str, NamespaceTotals], prefix: str
) -> AsyncIterator[tuple[ObjectName, ObjectInfo]]:
    """List again instead of keeping the inventory's names: objects that appeared in between in new namespaces wait."""
    async for info in objects.list(prefix):
        name = parse_name(info.key)
        if name is not None and name.is_chunk and name.namespace in namespaces:
            yield name, info


def _check_namespaces(namespaces: dict[str, NamespaceTotals], findings: Findings) -> None:
    for totals in namespaces.values():
        findings.unmarked += [marker_key(totals.hex, shard) for shard in totals.unmarked]
        if totals.problem is not None:
            damage = Damage(f"{totals.hex}/{NAMESPACE_JSON}", "NAMESPACE", totals.problem)
            findings.damaged.append(damage)
            lost = count_noun(totals.objects, "object")
            say(f"damaged: {damage.object}: {damage.reason}; its {lost} cannot be verified")


async def _check_calibrations(
    objects: ObjectStore, totals: NamespaceTotals, findings: Findings, *, keep: bool
) -> Artefacts:
    """Verify a namespace's artefacts, and that calibration.json names one of them. Returns those that are sound."""
    sound: Artefacts = {}
    for digest in totals.calibrations if totals.namespace is not None else ():
        try:
            data = await read_artefact(objects, totals.hex, digest)
            if data is not None and totals.namespace is not None:
                calibration = await asyncio.to_thread(parse_artefact, data, totals.namespace)
                sound[digest] = calibration if keep else None
                findings.calibrations += 1
        except ObjectNotFoundError:
            findings.vanished += 1
        except (DamagedObjectError, InvalidArgumentError) as error:
            _note_damage(findings, artefact_key(totals.hex, digest), str(error))
    if totals.names_calibration and totals.namespace is not None:
        try:
            current = await read_current(objects, totals.hex)
            if current is not None and current not in sound:
                reason = f"it names calibration {current.hex()[:16]}, which is damaged or not there"
                _note_damage(findings, current_key(totals.hex), reason)
        except ObjectNotFoundError:
            findings.vanished += 1
        except DamagedObjectError as error:
            _note_damage(findings, current_key(totals.hex), str(error))
    return sound


def _note_damage(findings: Findings, key: str, reason: str) -> None:
    findings.damaged.append(Damage(key, "CALIBRATION", reason))
    say(f"damaged: {key}: {reason}")


async def _delete_damaged(objects: ObjectStore, findings: Findings) -> None:
    for key in [*(damage.object for damage in findings.damaged), *findings.lacking]:
        await objects.delete(key)
        findings.deleted.append(key)


def _report(
    url: str, namespaces: dict[str, NamespaceTotals], findings: Findings, foreign: int, seconds: float
) -> Report:
    damaged = [{"object": item.object, "fault": item.fault, "reason": item.reason} for item in findings.damaged]
    data = {
        "store": url,
        "namespaces": len(namespaces),
        "objects": findings.objects,
        "bytes": findings.bytes,
        "damaged": damaged,
        "deleted": findings.deleted,
        "calibrations": findings.calibrations,
        "lacking_calibration": findings.lacking,
        "missing_markers": findings.unmarked,
        "unverifiable": findings.unverifiable,
        "vanished": findings.vanished,
        "foreign": foreign,
        "seconds": round(seconds, 3),
    }
    some = findings.lacking or findings.unmarked
    exit_code = exits.DAMAGED if findings.damaged else exits.SOME_FAILED if some else exits.DONE
    return Report(data, list(_describe(findings, len(namespaces), foreign, seconds)), exit_code)


def _describe(findings: Findings, namespaces: int, foreign: int, seconds: float) -> list[str]:
    if not (findings.objects or findings.calibrations or findings.damaged or foreign):
        return ["nothing is stored here; is the store's URL right?"]
    verdict = f"{len(findings.damaged):,} damaged" if findings.damaged else "all as saved"
    lines = [
        f"{count_noun(findings.objects, 'object')} in {count_noun(namespaces, 'namespace')}, "
        f"{format_bytes(findings.bytes)}, read in {format_seconds(seconds)}: {verdict}"
    ]
    lines += [f"damaged  {item.object}  {item.reason}" for item in findings.damaged]
    if findings.deleted:
        lines.append(f"{count_noun(len(findings.deleted), 'object')} deleted; the next warm stores them again")
    elif findings.damaged:
        lines.append("check --delete removes what is damaged; the next warm stores it again")
    if findings.calibrations:
        lines.append(f"{count_noun(findings.calibrations, 'calibration')}, as published")
    if findings.lacking:
        lines.append(
            f"{count_noun(len(findings.lacking), 'object')} coded with a calibration that is not there: misses until "
            "it is back; check --delete removes them"
        )
    lines += [
        f"missing  {key}: other ranks do not find its objects; the next save puts it" for key in findings.unmarked
    ]
    if findings.unverifiable:
        lines.append(f"{count_noun(findings.unverifiable, 'object')} without a namespace.json to verify against")
    if foreign:
        lines.append(f"{count_noun(foreign, 'object')} not written by kvstore_s3, left alone")
    return lines
