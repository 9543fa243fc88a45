"""Names and headers of the tier's files. Pure.

A file is named after its object and its bytes, `<hh>/<blake3 of the key, hex>.<start>-<end>`, and begins with a page
that says the same in full, so that a file under a wrong name is noticed:

| Bytes | Field |
|---|---|
| 8 | magic `KVS3TIER` |
| 4 | version, 1 (all numbers are little-endian) |
| 4 | size of this header, 4096 |
| 8, 8 | start and end: which bytes of the object follow |
| 2 | length of the key |
| up to 512 | the key, ASCII; zeros follow |
| 32, at 4064 | BLAKE3 of the bytes 0 to 4063 |
"""

from __future__ import annotations

import re
import struct

from blake3 import blake3

from kvstore_s3.tier.base import PAGE
from kvstore_s3.tier.extents import Extent

VERSION = 1
_MAGIC = b"KVS3TIER"
_FIELDS = struct.Struct("<8sIIQQH")
_DIGEST_AT = PAGE - 32
_NAME = re.compile(r"([0-9a-f]{64})\.(0|[1-9][0-9]{0,17})-([1-9][0-9]{0,17})", re.ASCII)


def digest_of(key: str) -> str:
    """The name of an object's extents here."""
    return blake3(key.encode("ascii")).hexdigest()


def path_of(extent: Extent) -> str:
    """Where the extent is kept, relative to the tier's directory. `extent.name` is a digest."""
    return f"{extent.name[:2]}/{extent.name}.{extent.start}-{extent.end}"


def parse_name(name: str) -> Extent | None:
    """The extent of the file `name` (without its directory), or None where the tier would not call a file so."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    extent = Extent(found[1], int(found[2]), int(found[3]))
    return extent if extent.size > 0 else None


def make_header(key: str, extent: Extent) -> bytes:
    """The first page of the file that keeps `extent` of the object `key`."""
    name = key.encode("ascii")
    fields = _FIELDS.pack(_MAGIC, VERSION, PAGE, extent.start, extent.end, len(name))
    body = (fields + name).ljust(_DIGEST_AT, b"\0")
    return body + blake3(body).digest()


def header_fault(page: bytes, key: str, extent: Extent) -> str | None:
    """What is wrong with the first page of a file that should keep `extent` of `key`, or None."""
    if page == make_header(key, extent):
        return None
    if page[:8] != _MAGIC:
        return "it does not begin as a tier file does"
    if blake3(page[:_DIGEST_AT]).digest() != page[_DIGEST_AT:]:
        return "the digest of its header is wrong"
    return "its header names another version, object or range"
