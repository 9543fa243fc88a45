"""doctor: what this installation can do on this machine: the CPU's codecs, the GPU library, the GPU."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import kvstore_s3
from kvstore_s3.cli import exits
from kvstore_s3.cli.output import Report, format_bytes

OLDEST_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs that the library is built for (csrc/cuda/CMakeLists.txt): Ampere."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device that torch sees."""

    name: str
    capability: tuple[int, int]
    memory: int
    multiprocessors: int

    @property
    def usable(self) -> bool:
        return self.capability >= OLDEST_CAPABILITY

    def describe(self) -> str:
        major, minor = self.capability
        text = f"{self.name}, compute capability {major}.{minor}, {format_bytes(self.memory)}"
        return text if self.usable else f"{text}: too old, decoding needs {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"


def examine() -> Report:
    """Look at everything, touch nothing. Exit code 1 where even the CPU half does not work."""
    native, native_data = _native_line()
    found, library_reason = _find_gpu_library()
    gpus, gpu_reason = find_gpus()
    verdict = decide(library=found, gpus=gpus)
    lines = [
        f"kvstore-s3     {kvstore_s3.__version__}, Python {platform.python_version()}, {_torch_line()}",
        f"native codecs  {native}",
        f"GPU library    {library_reason if found else f'none: {library_reason}'}",
        *[f"GPU            {gpu.describe()}" for gpu in gpus],
        *([] if gpus else [f"GPU            none: {gpu_reason}"]),
        f"decoding       {verdict}",
    ]
    data = {
        "version": kvstore_s3.__version__,
        "native_implementations": native_data,
        "gpu_library": {"found": found, "detail": library_reason},
        "gpus": [
            {
                "name": gpu.name,
                "capability": list(gpu.capability),
                "memory_bytes": gpu.memory,
                "multiprocessors": gpu.multiprocessors,
                "usable": gpu.usable,
            }
            for gpu in gpus
        ],
        "decoding": verdict,
    }
    return Report(data, lines, exits.DONE if native_data else exits.SOME_FAILED)


def decide(*, library: bool, gpus: list[Gpu]) -> str:
    """Where KV is decoded, and what would have to be there for a GPU to do it."""
    if library and any(gpu.usable for gpu in gpus):
        return "on the GPU"
    if not library and gpus:
        return "on the CPU: there is a GPU, but no library for it; `make cuda`, or install again where nvcc is"
    if not library:
        return "on the CPU: no GPU library was built, and there is no GPU"
    return f"on the CPU: the GPU library is built, but {'the GPU is too old' if gpus else 'there is no GPU'}"


def find_gpus() -> tuple[list[Gpu], str]:
    """The CUDA devices that torch sees, and why there are none."""
    import torch

    if torch.version.cuda is None:
        return [], f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return [], f"torch {torch.__version__} sees no CUDA device"
    found = []
    for number in range(torch.cuda.device_count()):
        device: Any = torch.cuda.get_device_properties(number)
        found.append(Gpu(device.name, (device.major, device.minor), device.total_memory, device.multi_processor_count))
    return found, ""


def _find_gpu_library() -> tuple[bool, str]:
    from kvstore_s3.codec.device.library import find_library

    found = find_library()
    return found.library is not None, found.reason


def _torch_line() -> str:
    import torch

    return f"torch {torch.__version__}"


def _native_line() -> tuple[str, list[str]]:
    try:
        from kvstore_s3.codec.implementations import native_implementations
    except ImportError as error:
        return f"cannot be loaded ({error}); install the package again", []
    names = native_implementations()
    return f"{names[-1]} (of {', '.join(names)})", names
