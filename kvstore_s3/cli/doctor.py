"""doctor: what this installation can do on this machine: the CPU's codecs, the GPU library, the GPU."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import kvstore_s3
from kvstore_s3.cli import exits
from kvstore_s3.cli.output import Report, format_bytes

if TYPE_CHECKING:
    from kvstore_s3.codec.device.library import Library

OLDEST_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs that the library is built for (csrc/cuda/CMakeLists.txt): Ampere."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device that torch sees."""

    name: str
    capability: tuple[int, int]
    memory: int
    multiprocessors: int
    refused: str | None = None
    """Why the library's kernels cannot run there, by its own account."""

    @property
    def lacking(self) -> str | None:
        """Why KV cannot be decoded there."""
        if self.capability < OLDEST_CAPABILITY:
            return f"too old, decoding needs {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
        return self.refused

    @property
    def usable(self) -> bool:
        return self.lacking is None

    def describe(self) -> str:
        major, minor = self.capability
        text = f"{self.name}, compute capability {major}.{minor}, {format_bytes(self.memory)}"
        return text if self.usable else f"{text}: {self.lacking}"


def examine() -> Report:
    """Look at everything, change nothing. Exit code 1 where even the CPU half does not work."""
    native, native_data = _native_line()
    library, library_reason = _find_gpu_library()
    found = library is not None
    gpus, gpu_reason = find_gpus(library)
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
    lacking = f"the GPU is not usable: {gpus[0].lacking}" if gpus else "there is no GPU"
    return f"on the CPU: the GPU library is built, but {lacking}"


def find_gpus(library: Library | None) -> tuple[list[Gpu], str]:
    """The CUDA devices that torch sees, with what `library` says of each, and why there are none."""
    import torch

    if torch.version.cuda is None:
        return [], f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return [], f"torch {torch.__version__} sees no CUDA device"
    found = []
    for number in range(torch.cuda.device_count()):
        device: Any = torch.cuda.get_device_properties(number)
        with torch.cuda.device(number):
            refused = None if library is None else library.why_not()
        capability = (device.major, device.minor)
        found.append(Gpu(device.name, capability, device.total_memory, device.multi_processor_count, refused))
    return found, ""


def _find_gpu_library() -> tuple[Library | None, str]:
    from kvstore_s3.codec.device.library import find_library

    found = find_library()
    return found.library, found.reason


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
