"""The GPU that a benchmark finds, its library, and the time that the benchmark may take there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_journal import Journal

from kvstore_s3.codec.device.library import Library, find_library
from kvstore_s3.errors import KVStoreError

FAILURES = (AssertionError, RuntimeError, MemoryError, OSError, KVStoreError, subprocess.SubprocessError)
"""What ends a task and no other; anything else ends the process, and a new one goes on."""
LIMITS = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
LOAD = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_throttle_reasons.active")


@dataclass
class Budget:
    """Time that is left; what does not fit is named, and kept in `left_out`."""

    seconds: float
    left_out: list[str] = field(default_factory=list)
    """What, and why. It may be a journal's."""

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


class GpuLostError(Exception):
    """An error of the GPU ended all use of it by this process."""


@contextmanager
def attempt(what: str, journal: Journal, budget: Budget, device: torch.device) -> Iterator[None]:
    """What fails inside is kept as failed, and what the GPU's memory does not hold as left out; then life goes on.

    Raises `GpuLostError` where the GPU does not answer any more: behind an error of a kernel it never does.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        budget.leave_out(what, "the GPU's memory does not hold it")
    except FAILURES as error:
        journal.fail(what, f"{type(error).__name__}: {error}", getattr(error, "row", None))
        try:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except RuntimeError as lost:
            raise GpuLostError(str(lost)) from lost


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
    torch.cuda.set_device(device)
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
        "l2_mb": round(getattr(found, "L2_cache_size", 0) / 1e6, 1),
        "cuda": torch.version.cuda,
        **ask_driver(LIMITS),
    }


def ask_driver(asked: Sequence[str]) -> dict[str, str]:
    """What nvidia-smi says of the GPU that is the first to CUDA; nothing where it says nothing."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip() or "0"
    command = ["nvidia-smi", "--query-gpu=" + ",".join(asked), "--format=csv,noheader", f"--id={first}"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(asked, (part.strip() for part in told.split(",")), strict=False))


def describe_load(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature while the tensor cores are busy for a second or two."""
    if device.type == "cuda":
        matrix = torch.randn(16384, 16384, device=device, dtype=torch.bfloat16)
        for _ in range(100):
            matrix @ matrix
    found = ask_driver(LOAD)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found


if __name__ == "__main__":
    here = find_machine(None)
    print("" if here is None else here.name)
