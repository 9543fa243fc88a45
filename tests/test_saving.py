"""What a save does to the rest of the process."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_s3 import KVLayout, KVStore, Namespace, saving

LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=16, dtype="bfloat16")
NAMESPACE = Namespace(model="test/saving", revision="1", layout=LAYOUT, chunk_tokens=16)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a priority is the whole process's")
async def test_threads_that_encode_leave_the_cores_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    encode = saving.encode_object

    def note(*args: Any) -> Any:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return encode(*args)

    monkeypatch.setattr(saving, "encode_object", note)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    async with KVStore.open(f"file://{tmp_path}", NAMESPACE) as store:
        await store.save(range(32), torch.randn(2, 2, 32, 2, 16).bfloat16())
    assert found == [min(own + 10, 19)] * 2
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
