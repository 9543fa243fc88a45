"""The GPU that a benchmark finds, its library, and the time that the benchmark may take there."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from kvstore_s3.codec.device.library import Library, find_library


@dataclass
class Budget:
    """Time that is left; what does not fit is named, and kept in `left_out`."""

    seconds: float
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds

    def allows(self, what: str, needed: float = 0.0) -> bool:
        """Whether there is time for something that takes `needed` seconds; says so where not."""
        if time.monotonic() + needed < self._end:
            return True
        expected = f", and it would take {needed:.0f}" if needed else ""
        self.leave_out(what, f"{max(self._end - time.monotonic(), 0):.0f} of {self.seconds:.0f} s are left{expected}")
        return False

    def leave_out(self, what: str, why: str) -> None:
        print(f"left out, {why}: {what}", flush=True)
        self.left_out.append(f"{what}: {why}")


@dataclass(frozen=True)
class Machine:
    """A GPU, what is known of it, and the name of the file that keeps its figures."""

    device: torch.device
    library: Library
    gpu: dict[str, Any]
    name: str


def find_machine(name: str | None) -> Machine | None:
    """The first GPU; None, and said, where there is none or no library for it. `name`: another file for the figures."""
    found = find_library()
    if found.library is None or not torch.cuda.is_available():
        why = found.reason if found.library is None else f"torch {torch.__version__} sees no GPU"
        print(f"this benchmark needs the GPU library (`make cuda`) and a GPU: {why}", file=sys.stderr)
        return None
    device = torch.device("cuda", 0)
    gpu = describe_gpu(device)
    slug = re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-")
    return Machine(device, found.library, gpu, name or f"gpu-{slug}")


def describe_gpu(device: torch.device) -> dict[str, Any]:
    found: Any = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gb": round(found.total_memory / 1e9, 1),
        "l2_mb": round(found.L2_cache_size / 1e6, 1),
        "cuda": torch.version.cuda,
    }
