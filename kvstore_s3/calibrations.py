"""Calibration artefacts in the store: which one writers use, and those that objects name. Their bytes are untrusted."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

from kvstore_s3.errors import BitstreamFault, DamagedObjectError, InvalidArgumentError, ObjectNotFoundError
from kvstore_s3.load import run_all
from kvstore_s3.namespace import Namespace
from kvstore_s3.objectstore.base import ObjectStore

if TYPE_CHECKING:
    from kvstore_s3.codec.calibration import Calibration

log = logging.getLogger("kvstore_s3")

CALIBRATION_JSON = "calibration.json"
CALIBRATION_FOLDER = "calibration"
MAX_ARTEFACT_BYTES = 1024 * 1024 * 1024
"""Larger artefacts are refused before anything is allocated."""

_MAX_JSON_BYTES = 4096
_PIECE_BYTES = 8 * 1024 * 1024
_PIECES_AT_ONCE = 8
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


def current_key(namespace_hex: str) -> str:
    """The object that names the calibration that writers of a namespace use."""
    return f"{namespace_hex}/{CALIBRATION_JSON}"


def artefact_key(namespace_hex: str, digest: bytes) -> str:
    return f"{namespace_hex}/{CALIBRATION_FOLDER}/{digest.hex()}.safetensors"


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What was found under a name, and until when that is believed."""

    calibration: Calibration | None
    until: float


class Calibrations:
    """The calibrations of one namespace. For one event loop.

    What was found stays in memory; what is missing or wrong is asked for again after `lifetime_s` seconds, and so is
    which calibration is the current one. All verbs raise `StoreError` where the store fails.
    """

    def __init__(self, objects: ObjectStore, namespace: Namespace, *, lifetime_s: float = 60.0) -> None:
        self._objects = objects
        self._namespace = namespace
        self._lifetime_s = lifetime_s
        self._verdicts: dict[bytes, _Verdict] = {}
        self._current: tuple[bytes | None, float] = (None, 0.0)
        self.last: tuple[bytes, Calibration] | None = None
        """What `current` said last, which asks nobody; None before."""
        self.asked = False
        """Whether it has said anything."""
        self._told: set[object] = set()
        self._turn = asyncio.Lock()

    async def current(self) -> tuple[bytes, Calibration] | None:
        """Digest and calibration that writers use; None where there is none, or none that can be used."""
        digest, until = self._current
        if until <= time.monotonic():
            digest = await self._read_current()
            self._current = (digest, time.monotonic() + self._lifetime_s)
        calibration = await self.find(digest) if digest else None
        self.last, self.asked = (digest, calibration) if digest and calibration else None, True
        return self.last

    async def find(self, digest: bytes) -> Calibration | None:
        """The calibration of that digest; None, said once in the log, where it is missing or its bytes are not it."""
        async with self._turn:  # one fetch, however many objects wait for it
            known = self._verdicts.get(digest)
            if known is None or known.until <= time.monotonic():
                calibration = await self._fetch(digest)
                until = float("inf") if calibration else time.monotonic() + self._lifetime_s
                known = self._verdicts[digest] = _Verdict(calibration, until)
        return known.calibration

    async def publish(self, data: bytes) -> bytes:
        """Store an artefact and make it the one that writers use; return its digest.

        Raises `InvalidArgumentError` where it is not a calibration of this namespace.
        """
        calibration = await self._parse(data)
        digest = _digest(data)
        key = artefact_key(self._namespace.hex, digest)
        await self._objects.put(f"{self._namespace.hex}/namespace.json", self._namespace.to_json().encode("ascii"))
        if not await self._objects.put(key, data) and await self._fetch(digest) is None:
            await self._objects.put(key, data, replace=True)  # what lay under its name was damaged
        self._verdicts[digest] = _Verdict(calibration, float("inf"))
        document = json.dumps({"digest": digest.hex()}).encode("ascii")
        await self._objects.put(current_key(self._namespace.hex), document, replace=True)
        self._current = (digest, time.monotonic() + self._lifetime_s)
        self.last, self.asked = (digest, calibration), True
        return digest

    async def _read_current(self) -> bytes | None:
        try:
            return await read_current(self._objects, self._namespace.hex)
        except (DamagedObjectError, ObjectNotFoundError) as error:
            self._tell(CALIBRATION_JSON, f"{current_key(self._namespace.hex)} is ignored: {error}")
            return None

    async def _fetch(self, digest: bytes) -> Calibration | None:
        name = digest.hex()[:16]
        try:
            data = await read_artefact(self._objects, self._namespace.hex, digest)
            if data is None:
                reason = "is not in the store"
            else:
                return await self._parse(data)
        except (DamagedObjectError, ObjectNotFoundError, InvalidArgumentError) as error:
            reason = f"cannot be used: {error}"
        self._tell(digest, f"calibration {name} {reason}; what was stored with it is a miss, and is stored again")
        return None

    async def _parse(self, data: bytes) -> Calibration:
        return await asyncio.to_thread(parse_artefact, data, self._namespace)

    def _tell(self, what: object, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning("%s", message)


def parse_artefact(data: bytes, namespace: Namespace) -> Calibration:
    """The calibration in `data`. Raises `InvalidArgumentError` where it is not one of this namespace."""
    from kvstore_s3.codec.calibration import Calibration  # brings torch, which listing does without

    return Calibration.from_bytes(data, namespace.layout, namespace.digest)


async def read_current(objects: ObjectStore, namespace_hex: str) -> bytes | None:
    """The digest in a namespace's calibration.json, None where there is none. Raises `DamagedObjectError`."""
    key = current_key(namespace_hex)
    info = await objects.head(key)
    if info is None:
        return None
    if not 0 < info.size <= _MAX_JSON_BYTES:
        raise _damaged(f"it has {info.size} bytes, expected 1 to {_MAX_JSON_BYTES}")
    text = bytearray(info.size)
    await objects.get_range(key, 0, memoryview(text))
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"it is not JSON: {error}") from error
    digest = document.get("digest") if isinstance(document, dict) else None
    if not isinstance(digest, str) or _DIGEST.fullmatch(digest) is None:
        raise _damaged('it is not {"digest": 64 hex digits}')
    return bytes.fromhex(digest)


async def read_artefact(objects: ObjectStore, namespace_hex: str, digest: bytes) -> bytes | None:
    """The bytes of an artefact, None where there is none. Raises `DamagedObjectError` where they are not its own."""
    key = artefact_key(namespace_hex, digest)
    info = await objects.head(key)
    if info is None:
        return None
    if not 0 < info.size <= MAX_ARTEFACT_BYTES:
        raise _damaged(f"it has {info.size} bytes, expected 1 to {MAX_ARTEFACT_BYTES}")
    data = bytearray(info.size)
    await _read_pieces(objects, key, memoryview(data))
    found = bytes(data)
    if await asyncio.to_thread(_digest, found) != digest:
        raise DamagedObjectError(BitstreamFault.SECTION_CHECKSUM, "its bytes are not those it is named after")
    return found


async def _read_pieces(objects: ObjectStore, key: str, into: memoryview) -> None:
    """Read a whole object in ranges of 8 MiB, some at once."""
    starts = iter(range(0, len(into), _PIECE_BYTES))

    async def work() -> None:
        for start in starts:
            await objects.get_range(key, start, into[start : start + _PIECE_BYTES])

    await run_all([work() for _ in range(min(_PIECES_AT_ONCE, -(-len(into) // _PIECE_BYTES)))])


def _digest(data: bytes) -> bytes:
    return blake3(data).digest()


def _damaged(found: str) -> DamagedObjectError:
    return DamagedObjectError(BitstreamFault.BAD_HEADER, found)
