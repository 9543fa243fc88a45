"""Occupancy of each kernel: warps of a multiprocessor for which its registers, threads and shared memory leave room.

From the recorded budget (csrc/cuda/budget.json), that is from the compiler's report; no GPU is asked. Shared memory is
that of the largest block; a kernel whose shared memory depends on its work is counted without.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUDGET = Path(__file__).parent.parent / "csrc" / "cuda" / "budget.json"
REGISTERS, REGISTERS_AT_ONCE, WARP = 65536, 256, 32
"""Of a multiprocessor, and as many as they are given to a warp at a time."""
SHARED_FOR_SYSTEM = 1024
"""Bytes of each block."""


@dataclass(frozen=True, slots=True)
class Multiprocessor:
    threads: int
    blocks: int
    shared: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(2048, 32, 164 * 1024),
    "sm_90": Multiprocessor(2048, 32, 228 * 1024),
    "sm_100": Multiprocessor(2048, 32, 228 * 1024),
}
"""NVIDIA's CUDA C++ Programming Guide, technical specifications by compute capability."""


def describe_occupancy(capability: str) -> dict[str, Any]:
    """For a compute capability such as "9.0", by the code that such a GPU runs. Empty for one that is older."""
    number = int(capability.replace(".", ""))
    names = [name for name in MULTIPROCESSORS if int(name[3:]) <= number]
    if not names:
        return {}
    name = max(names, key=lambda one: int(one[3:]))
    budget = json.loads(BUDGET.read_text())
    kernels = {
        kernel: occupancy(MULTIPROCESSORS[name], found["threads"], found["shared"], found["uses"][name])
        for kernel, found in budget["kernels"].items()
    }
    return {"code": name, "compiler": f"nvcc {budget['compiler']}", "kernels": kernels}


def occupancy(room: Multiprocessor, threads: int, shared: int, use: dict[str, int]) -> dict[str, Any]:
    """Blocks at once, their share of the warps, and what bounds them."""
    warps = threads // WARP
    of_warp = -(-use["registers"] * WARP // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    bounds = {
        "registers": REGISTERS // of_warp // warps,
        "threads": room.threads // threads,
        "shared memory": room.shared // (max(shared, 0) + SHARED_FOR_SYSTEM),
        "blocks": room.blocks,
    }
    by = min(bounds, key=lambda bound: bounds[bound])
    return {
        "threads": threads,
        "registers": use["registers"],
        "spilled_bytes": use["spills"],
        "shared_bytes": shared if shared >= 0 else None,
        "blocks": bounds[by],
        "warps": bounds[by] * warps,
        "occupancy": bounds[by] * threads / room.threads,
        "bound_by": by,
    }


def print_occupancy(found: dict[str, Any]) -> None:
    for name, kernel in found.get("kernels", {}).items():
        print(
            f"{name:24}{kernel['warps']:3} warps at once, occupancy {kernel['occupancy']:.2f} by {kernel['bound_by']}, "
            f"{kernel['registers']} registers"
        )
