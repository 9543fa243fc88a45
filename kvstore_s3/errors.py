"""Every error a caller can meet. One small tree; foreign exceptions are mapped to it at the leaf.

The command line turns `exit_code` into its own: 2 usage, 3 store not reachable or refused, 4 damaged data.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class KVStoreError(Exception):
    """Base of all errors of this package. The message says what was expected, what was found, what to do."""

    exit_code: ClassVar[int] = 1


class InvalidArgumentError(KVStoreError, ValueError):
    """An argument, setting, URL or input file is wrong; nothing was done."""

    exit_code = 2


class UnsupportedModelError(KVStoreError):
    """This model's KV cache cannot be cut into prefix chunks, or not yet; the message names the reason."""

    exit_code = 2


class StoreError(KVStoreError):
    """The object store failed."""

    exit_code = 3


class StoreUnavailableError(StoreError):
    """Not reachable, timed out, or answered with a server error: trying later may help."""


class StoreBusyError(StoreUnavailableError):
    """The store asked to slow down, or a write was put off because it had: reads go on, writes wait."""


class StoreRefusedError(StoreError):
    """Reached, but refused: credentials, permission, missing bucket. Trying again will not help."""


class ObjectNotFoundError(StoreError):
    """The object vanished between a lookup and a read."""


class DeviceError(KVStoreError):
    """The GPU, or the code for it, failed: out of memory, an error of CUDA, a library that does not load."""


class DamagedObjectError(KVStoreError):
    """Stored bytes are not what was saved under this name: damaged, short, swapped or hostile."""

    exit_code = 4

    def __init__(self, code: BitstreamFault, message: str) -> None:
        super().__init__(f"{message} [{code.name}]")
        self.code = code


class BitstreamFault(IntEnum):
    """Why a bitstream was refused. The numbers are pinned: FORMAT.md, the golden errors and csrc use them."""

    TRUNCATED = 1  # fewer bytes than the header or the layout calls for
    BAD_MAGIC = 2
    UNSUPPORTED_VERSION = 3
    UNSUPPORTED_FEATURE = 4  # unknown dtype, profile, codec, digest or authenticator id, or a reserved bit is set
    BAD_HEADER = 5  # fields that contradict each other, or lie beyond the limits
    BAD_INDEX = 6  # sections overlap, leave holes, or do not cover the shard
    HEADER_CHECKSUM = 7
    SECTION_CHECKSUM = 8
    WRONG_NAMESPACE = 9
    WRONG_KEY = 10
    WRONG_SHARD = 11
    WRONG_LAYOUT = 12  # tokens, head dim or dtype are not those of the reader's layout
    BAD_PAYLOAD = 13  # the checksum holds, but the codec cannot decode the section
    TRAILING_BYTES = 14
