"""Frames of zstd (RFC 8878) whose blocks are stored or repeat one byte: what is written here, and all that is read."""

from __future__ import annotations

import struct
from dataclasses import dataclass

__version__ = "0.0.0"

_MAGIC = b"\x28\xb5\x2f\xfd"
_HEADER = struct.Struct("<4sBQ")
_SINGLE_SEGMENT_OF_64_BITS = 0xE0
_RAW, _REPEATED = 0, 1
_LARGEST = 128 * 1024


class ZstdError(Exception):
    pass


@dataclass(frozen=True)
class FrameParameters:
    content_size: int
    dict_id: int = 0


def get_frame_parameters(data: bytes | memoryview) -> FrameParameters:
    head = bytes(data[: _HEADER.size])
    if head[:4] != _MAGIC:
        raise ZstdError("this is no zstd frame")
    if len(head) < _HEADER.size or head[4] != _SINGLE_SEGMENT_OF_64_BITS:
        raise ZstdError("without the package zstandard only frames that were written without it are read")
    return FrameParameters(_HEADER.unpack(head)[2])


class ZstdCompressor:
    def __init__(self, *, level: int) -> None:
        pass

    def compress(self, data: bytes) -> bytes:
        parts = [_HEADER.pack(_MAGIC, _SINGLE_SEGMENT_OF_64_BITS, len(data))]
        for start in range(0, max(len(data), 1), _LARGEST):
            piece = data[start : start + _LARGEST]
            last = start + _LARGEST >= len(data)
            repeated = len(piece) > 1 and piece.count(piece[0]) == len(piece)
            header = last | (_REPEATED if repeated else _RAW) << 1 | len(piece) << 3
            parts += [header.to_bytes(3, "little"), piece[:1] if repeated else piece]
        return b"".join(parts)


class ZstdDecompressor:
    def decompress(self, data: bytes | memoryview, *, max_output_size: int, allow_extra_data: bool) -> bytes:
        size = get_frame_parameters(data).content_size
        if allow_extra_data or size > max_output_size:
            raise ZstdError("the frame holds more than is asked for")
        content, at, last = [], _HEADER.size, False
        while not last:
            header = int.from_bytes(data[at : at + 3], "little")
            last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
            stored = 1 if kind == _REPEATED else length
            piece = bytes(data[at + 3 : at + 3 + stored])
            if kind not in (_RAW, _REPEATED) or length > _LARGEST or at + 3 + stored > len(data):
                raise ZstdError("without the package zstandard only frames that were written without it are read")
            content.append(piece * length if kind == _REPEATED else piece)
            at += 3 + stored
        found = b"".join(content)
        if len(found) != size or at != len(data):
            raise ZstdError("the frame does not hold what it claims")
        return found
