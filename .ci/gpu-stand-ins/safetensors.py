"""What kvstore_s3 uses of the package safetensors: a file's tensors as bytes."""

from __future__ import annotations

import json
import struct
from typing import Any

_LARGEST_HEADER = 100_000_000


class SafetensorError(Exception):
    pass


def deserialize(data: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Name, and dtype, shape and bytes of each tensor. Raises `SafetensorError` unless they fill the file in order."""
    if len(data) < 8:
        raise SafetensorError("the file is too short for a header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(len(data) - 8, _LARGEST_HEADER):
        raise SafetensorError("the header is longer than the file, or too long")
    try:
        entries = json.loads(data[8 : 8 + length])
        found = [(entry["data_offsets"], name, entry) for name, entry in entries.items() if name != "__metadata__"]
        found.sort(key=lambda one: tuple(one[0]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SafetensorError(f"the header cannot be read: {error}") from error
    body, end, tensors = memoryview(data)[8 + length :], 0, []
    for (start, stop), name, entry in found:
        if start != end or stop < start:
            raise SafetensorError(f"{name} does not begin where the tensor before it ends")
        end = stop
        tensors.append((name, {"dtype": entry["dtype"], "shape": entry["shape"], "data": bytes(body[start:stop])}))
    if end != len(body):
        raise SafetensorError("tensors do not fill the file")
    return tensors
