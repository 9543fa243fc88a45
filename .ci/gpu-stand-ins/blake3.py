"""What kvstore_s3 uses of the package blake3. The hashing is digests.cpp's."""

from __future__ import annotations

from typing import Self

import _digests


class blake3:  # noqa: N801
    AUTO = -1

    def __init__(
        self,
        data: bytes = b"",
        /,
        *,
        key: bytes | None = None,
        derive_key_context: str | None = None,
        max_threads: int = 1,
    ) -> None:
        if key is not None and derive_key_context is not None:
            raise ValueError("a key and a context exclude each other")
        self._state = _digests.blake3_begin(key, derive_key_context)
        _digests.blake3_update(self._state, data)

    def update(self, data: bytes, /) -> Self:
        _digests.blake3_update(self._state, data)
        return self

    def digest(self, length: int = 32) -> bytes:
        return _digests.blake3_digest(self._state, length)

    def hexdigest(self, length: int = 32) -> str:
        return self.digest(length).hex()

    def copy(self) -> Self:
        copy = object.__new__(type(self))
        copy._state = self._state[:]
        return copy
