"""What bounds decoding on a GPU, measured in the same run: copies within it, copies to it, and the plainest decoder.

The plainest decoder (gpu_scatter.cu) reads a byte a value, multiplies by its component's scale and writes bf16 into
paged blocks: no codec that writes the same values with as many threads and more work for each can be faster.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from gpu_cases import BLOCK_TOKENS, Model, PagedCache
from gpu_clock import current_stream, seconds

COMPILES_IN = 30.0
"""Seconds at most; it takes some five."""
HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "gpu"


def measure_copies(device: torch.device, size: int) -> dict[str, float]:
    """Within the device (bytes read and written), and between it and page-locked host memory."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host.copy_(source)
    return {
        "device_copy_gb_s": 2 * size / seconds(lambda: target.copy_(source), device) / 1e9,
        "host_to_device_gb_s": size / seconds(lambda: target.copy_(host, non_blocking=True), device) / 1e9,
        "device_to_host_gb_s": size / seconds(lambda: host.copy_(source, non_blocking=True), device) / 1e9,
    }


def measure_scatter(model: Model, chunks: int, device: torch.device) -> float | None:
    """GB/s of bf16 written by the plain decoder; None, and said, where it cannot be built."""
    library = build_scatter() if device.type == "cuda" else None
    if library is None:
        print("dequantise and scatter: left out, it needs a GPU and nvcc (CUDACXX, CUDA_HOME, PATH)")
        return None
    cache = PagedCache(model, chunks, device)
    tokens, row = chunks * model.tokens, model.heads * model.dim
    planes = 2 * model.layers
    packed = torch.randint(-128, 127, (planes, tokens, row), dtype=torch.int8, device=device)
    scales = torch.rand((planes, row), device=device)

    def run() -> None:
        fault = library.scatter_plain(
            ctypes.c_void_p(packed.data_ptr()),
            ctypes.c_void_p(scales.data_ptr()),
            ctypes.c_void_p(cache.values.data_ptr()),
            ctypes.c_void_p(cache.table.data_ptr()),
            *(ctypes.c_uint32(number) for number in (planes, tokens, row, BLOCK_TOKENS)),
            ctypes.c_void_p(current_stream(device)),
        )
        assert fault == 0, f"CUDA error {fault}"

    return chunks * model.chunk_bytes / seconds(run, device) / 1e9


def build_scatter() -> ctypes.CDLL | None:
    """The plain decoder, compiled for the GPU that is here."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    places = os.pathsep.join([os.environ.get("PATH", ""), f"{home}/bin", str(packaged)])
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=places)
    if nvcc is None:
        return None
    BUILD.mkdir(parents=True, exist_ok=True)
    built = BUILD / "gpu_scatter.so"
    flags = ["-std=c++17", "-O3", "-arch=native", "-shared", "-Xcompiler=-fPIC", "-cudart=static"]
    command = [nvcc, *flags, str(HERE / "gpu_scatter.cu"), "-o", str(built)]
    subprocess.run(command, check=True, timeout=COMPILES_IN)
    return ctypes.CDLL(str(built))
