"""The GPU library for tests: its emulation on the host, built where it is not in the cache, or the real one.

With KVSTORE_S3_CUDA=1 the tests run on a GPU with the library that `make cuda` builds; otherwise the kernels' sources
are compiled as plain C++. Each source is an object of its own, named by the digest of all that it is made from.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import mmap
import os
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore_s3.codec.device.library import Library, find_library

ROOT = Path(__file__).resolve().parent.parent.parent
CSRC, RACES = ROOT / "csrc", ROOT / "tests" / "device" / "races"
# Fibres jump from stack to stack, which fortified libraries take for a mistake.
COMMON = ("-std=c++20", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror", "-U_FORTIFY_SOURCE")
# What C++ leaves undefined is an illegal instruction here: a GPU cannot even read across an alignment that a CPU does
# not mind.
UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize=vptr", "-fsanitize-undefined-trap-on-error")
# As the GPU's own build has it: else libraries of one process would share what their headers define.
HIDDEN = "-fvisibility=hidden"
FLAGS = (*COMMON, "-O2", HIDDEN, *UNDEFINED)
DETECTOR_FLAGS = (*COMMON, "-O2", "-DKVS_RACES")
# Calls before each access, which the detector takes; the compiler's own runtime for them is not linked.
WATCHED_FLAGS = (*COMMON, "-O1", "-g1", HIDDEN, "-DKVS_RACES", "-fsanitize=thread")
ON_DEVICE = os.environ.get("KVSTORE_S3_CUDA") == "1"
"""Read when tests are collected: `clean_environment` hides it from them."""

Array = npt.NDArray[np.generic]


class Buffer(Protocol):
    """Bytes that kernels can reach."""

    address: int

    def read(self) -> bytes: ...


class Device(Protocol):
    """Where kernels run, and its memory."""

    library: Library
    stream: int

    def put(self, data: Array | bytes, *, align: int = 16, skew: int = 0, front: bool = False) -> Buffer:
        """A copy whose address is `skew` more than a multiple of `align`.

        What lies beyond it cannot be reached where kernels are emulated: up to `align` bytes behind it may be, or, with
        `front`, `skew` bytes before it.
        """
        ...


class GuardedBuffer:
    """Host memory between two pages that cannot be touched."""

    def __init__(self, data: bytes, align: int, skew: int, front: bool) -> None:
        page = mmap.PAGESIZE
        end = page * (1 + -(-(len(data) + align + skew) // page))
        self._length = len(data)
        self._map = mmap.mmap(-1, end + page)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        begin = page + skew if front else end - len(data) - (end - len(data) - skew) % align
        self.address = self._base + begin
        ctypes.memmove(self.address, data, len(data))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for guard in (self._base, self._base + end):
            if protect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def read(self) -> bytes:
        return ctypes.string_at(self.address, self._length)


class EmulatedDevice:
    """The host. A kernel that leaves what it was given stops the test run there."""

    stream = 0

    def __init__(self, library: Library) -> None:
        self.library = library

    def put(self, data: Array | bytes, *, align: int = 16, skew: int = 0, front: bool = False) -> GuardedBuffer:
        return GuardedBuffer(_bytes_of(data), align, skew, front)


class TorchBuffer:
    """Memory of a GPU; what leaves it, `compute-sanitizer` reports."""

    def __init__(self, data: bytes, skew: int) -> None:
        import torch

        host = np.frombuffer(bytes(skew) + data, np.uint8).copy()  # torch's own address is a multiple of 512
        self._tensor = torch.from_numpy(host).to("cuda")
        self._skip = skew
        self.address = self._tensor.data_ptr() + skew

    def read(self) -> bytes:
        return bytes(self._tensor[self._skip :].cpu().numpy().tobytes())


class TorchDevice:
    """The GPU that torch names first. Kernels run on the default stream, for which `read` waits."""

    stream = 0

    def __init__(self, library: Library) -> None:
        self.library = library

    def put(self, data: Array | bytes, *, align: int = 16, skew: int = 0, front: bool = False) -> TorchBuffer:
        return TorchBuffer(_bytes_of(data), skew)


def open_device(cache: Path) -> Device:
    """The GPU where KVSTORE_S3_CUDA asks for one, else the emulation, built into `cache`."""
    if not ON_DEVICE:
        return EmulatedDevice(Library(build(cache), emulated=True))
    found = find_library()
    if found.library is None:
        raise RuntimeError(f"KVSTORE_S3_CUDA=1 asks for a GPU's library: {found.reason}; run `make cuda`")
    return TorchDevice(found.library)


def find_compiler() -> list[str]:
    """The C++ compiler and its first arguments."""
    return shlex.split(os.environ.get("CXX", "c++"))


def build(cache: Path, *, watched: bool = False) -> Path:
    """The emulation of all kernels as a shared library. One process builds, others wait for it.

    `watched`: with the detector of data races (watched.py).
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compiler = find_compiler()
        common = _digest([compiler, run_command([*compiler, "--version"])], sorted(CSRC.rglob("*.h")))
        sources = [(source, WATCHED_FLAGS if watched else FLAGS) for source in _sources()]
        if watched:
            sources += [(RACES / "detector.cpp", DETECTOR_FLAGS), (RACES / "mistakes.cu", WATCHED_FLAGS)]
        objects = [_compile([*compiler, *flags], source, common, cache) for source, flags in sources]
        return _make(
            cache, _digest(objects, []), ".so", lambda to: [*compiler, "-shared", *map(str, objects), "-o", to]
        )


def _sources() -> list[Path]:
    """As the GPU's own build takes them (csrc/cuda/CMakeLists.txt), and the emulator."""
    return sorted([*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp")])


def _compile(compiler: list[str], source: Path, common: str, cache: Path) -> Path:
    def command(to: str) -> list[str]:
        return [*compiler, "-x", "c++", "-c", str(source), "-o", to]

    return _make(cache, f"{source.stem}-{_digest([compiler, common], [source])}", ".o", command)


def _make(cache: Path, name: str, suffix: str, command: _Command) -> Path:
    made = cache / (name + suffix)
    if not made.exists():
        unfinished = cache / f"unfinished{suffix}"
        run_command(command(str(unfinished)))
        unfinished.rename(made)
    return made


class _Command(Protocol):
    def __call__(self, to: str) -> list[str]: ...


def _digest(texts: Iterable[object], files: Iterable[Path]) -> str:
    digest = hashlib.blake2b(repr([str(text) for text in texts]).encode())
    for path in files:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def run_command(command: list[str]) -> str:
    """What it printed. Raises `RuntimeError` with what it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
    return done.stdout


def _bytes_of(data: Array | bytes) -> bytes:
    return data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
