"""A process that puts one object, to be killed while it does: `python putting_process.py URL BYTES`."""

from __future__ import annotations

import asyncio
import random
import sys

from kvstore_s3.config import load_settings
from kvstore_s3.objectstore.open import open_store

KEY = "aa/bb/object"


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


async def put(url: str, size: int) -> bool:
    store = open_store(url, load_settings())
    try:
        return await store.put(KEY, content(size))
    finally:
        await store.close()


if __name__ == "__main__":
    print("created" if asyncio.run(put(sys.argv[1], int(sys.argv[2]))) else "there already")
