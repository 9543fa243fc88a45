"""A process that loads a scene's prompt through a tier, to be killed while it does: `python loading_process.py URL`."""

from __future__ import annotations

import asyncio
import sys

from faults.scene import NAMESPACE, TOKENS

from kvstore_s3 import KVStore


async def load(url: str) -> None:
    async with KVStore.open(url, NAMESPACE) as store:
        hit = await store.lookup(TOKENS)
        print("loading", flush=True)
        await store.load(hit)


if __name__ == "__main__":
    asyncio.run(load(sys.argv[1]))
