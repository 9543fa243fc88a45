"""What kvstore_s3 uses of pydantic_core; see pydantic.py."""

from __future__ import annotations


class PydanticCustomError(ValueError):
    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.type = kind
