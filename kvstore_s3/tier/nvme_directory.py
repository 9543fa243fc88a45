"""Whether a directory may be used by the NVMe tier, and how. Blocking."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
from pathlib import Path

from kvstore_s3.tier.base import PAGE

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


def check_private(directory: Path) -> None:
    """What others may write to is not read from: whoever writes KV decides what the model is told."""
    status = os.stat(directory, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        message = "not a directory that belongs to this user alone; remove it or choose another"
        raise PermissionError(errno.EPERM, message, str(directory))


def probe_direct(directory: Path) -> bool:
    """Whether this file system takes O_DIRECT in pages of 4 KiB."""
    path = directory / secrets.token_hex(16)
    page = memoryview(mmap.mmap(-1, PAGE))
    try:
        file = os.open(path, _NEW | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            path.unlink(missing_ok=True)
            return False
        raise
    try:
        return os.pwrite(file, page, 0) == os.preadv(file, [page], 0) == PAGE
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    finally:
        path.unlink(missing_ok=True)
        os.close(file)
