"""What kvstore_s3 uses of the package xxhash: XXH3-128 without a seed. The hashing is digests.cpp's."""

from __future__ import annotations

from typing import Self

import _digests


class xxh3_128:  # noqa: N801
    def __init__(self, data: bytes = b"", /) -> None:
        self._state = _digests.xxh3_begin()
        _digests.xxh3_update(self._state, data)

    def update(self, data: bytes, /) -> None:
        _digests.xxh3_update(self._state, data)

    def digest(self) -> bytes:
        return _digests.xxh3_digest(self._state)

    def hexdigest(self) -> str:
        return self.digest().hex()

    def copy(self) -> Self:
        copy = object.__new__(type(self))
        copy._state = self._state[:]
        return copy


def xxh3_128_digest(data: bytes, /) -> bytes:
    return xxh3_128(data).digest()
