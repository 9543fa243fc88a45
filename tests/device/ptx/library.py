"""The GPU library for tests whose kernels are the PTX that nvcc makes of them: the host's half is compiled as for the
emulation, but for what starts a kernel, which hands it to an interpreter of PTX (machine.h). No GPU is needed; nvcc is.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shlex
import shutil
import sys
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import blake3
from device.emulated import Array, EmulatedDevice, GuardedBuffer, run_command

from kvstore_s3.codec.device.library import Library

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent.parent
CUDA = REPOSITORY / "csrc" / "cuda"
ARCHITECTURE = os.environ.get("KVSTORE_S3_TEST_PTX_ARCHITECTURE", "compute_90")
COMMON = ["-std=c++20", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror"]
HOST = [*COMMON, "-O2", "-fvisibility=hidden", f"-I{CUDA}", "-include", str(HERE / "launch_hook.h"), "-x", "c++"]
INTERPRETER = [*COMMON, "-O2", "-ftree-vectorize", "-march=native", "-fwrapv", "-fno-strict-aliasing"]
LOWEST_FIRST, AT_RANDOM = 0, 1


class PtxError(Exception):
    """A kernel did what a GPU would not stand, or what is specified nowhere."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A statement of a kernel's PTX, how often warps executed it, and the line of the sources that it comes from."""

    kernel: str
    line: int
    times: int
    source: str
    source_line: int
    text: str

    @property
    def opcode(self) -> str:
        words = self.text.split()
        return words[1] if words[0].startswith("@") else words[0]


class PtxLibrary:
    """The library that was built, with modules loaded. Each instance has an interpreter of its own."""

    def __init__(self, path: Path, modules: Sequence[str]) -> None:
        self.path, self.modules = path, list(modules)
        self.library = Library(path, emulated=True)
        self._calls = ctypes.CDLL(str(path))
        for name in ("ptx_load", "ptx_fault", "ptx_report"):
            getattr(self._calls, name).restype = ctypes.c_char_p
        for text in modules:
            self.load(text)

    def load(self, text: str) -> None:
        """Take the kernels of a module, in place of those that are called so."""
        if wrong := self._calls.ptx_load(text.encode()):
            raise PtxError(wrong.decode())

    def add_memory(self, begin: int, length: int) -> None:
        self._calls.ptx_add_memory(ctypes.c_uint64(begin), ctypes.c_uint64(length))

    def remove_memory(self, begin: int) -> None:
        self._calls.ptx_remove_memory(ctypes.c_uint64(begin))

    def allow_anything(self, allow: bool) -> None:
        """Whether kernels may reach all memory of this process, and not only what was added."""
        self._calls.ptx_allow_anything(allow)

    def set_order(self, order: int, seed: int = 0) -> None:
        self._calls.ptx_set_order(order, seed)

    def set_most(self, statements: int) -> None:
        """How many statements a launch may execute before it counts as one that does not end."""
        self._calls.ptx_set_most(ctypes.c_uint64(statements))

    def copy(self, folder: Path, modules: Sequence[str]) -> PtxLibrary:
        """Another interpreter beside this one, with other modules: of a path that is loaded there is but one."""
        other = folder / f"{len(list(folder.iterdir()))}.so"
        shutil.copy(self.path, other)
        return PtxLibrary(other, modules)

    @contextmanager
    def expecting_faults(self) -> Iterator[None]:
        """A fault is raised where this ends, instead of ending the process; what was computed is worth nothing then."""
        self._calls.ptx_tell_faults(True)
        try:
            yield
        finally:
            fault = self._calls.ptx_fault()
            self._calls.ptx_forget_fault()
            self._calls.ptx_tell_faults(False)
            if fault:  # whatever else was raised comes of it
                raise PtxError(fault.decode())

    def launch(self, functor: str, argument: bytes, blocks: int, threads: int, shared_bytes: int = 0) -> None:
        """A kernel by the name of its functor, as C++ writes it."""
        sizes = ctypes.c_uint32(blocks), ctypes.c_uint32(threads), ctypes.c_uint64(shared_bytes)
        self._calls.ptx_launch(functor.encode(), argument, ctypes.c_uint64(len(argument)), *sizes)

    def report(self) -> list[Ran]:
        lines: list[str] = self._calls.ptx_report().decode().splitlines()
        return [
            Ran(kernel, int(line), int(times), source, int(source_line), text)
            for kernel, line, times, source, source_line, text in (of.split("\t", 5) for of in lines)
        ]


class PtxDevice(EmulatedDevice):
    """Kernels reach what `put` put there, and nothing else."""

    def __init__(self, ptx: PtxLibrary) -> None:
        super().__init__(ptx.library)
        self.ptx = ptx

    def put(self, data: Array | bytes, *, align: int = 16, skew: int = 0, front: bool = False) -> GuardedBuffer:
        buffer = super().put(data, align=align, skew=skew, front=front)
        self.ptx.add_memory(buffer.address, len(buffer.read()))
        weakref.finalize(buffer, self.ptx.remove_memory, buffer.address)
        return buffer


def find_nvcc() -> str:
    """The pinned one, as for the budget, unless CUDACXX names another."""
    asked = os.environ.get("CUDACXX")
    return asked or run_command([sys.executable, str(REPOSITORY / ".ci" / "cuda-venv"), "--nvcc"]).strip()


@dataclass(frozen=True, slots=True)
class Step:
    """A file that is made once by a command, and named by the digest of all that it is made from."""

    made: Path
    command: list[str]

    def run(self) -> Path:
        if not self.made.exists():
            unfinished = self.made.with_name(f"unfinished-{self.made.name}")
            run_command([*self.command, "-o", str(unfinished)])
            unfinished.rename(self.made)
        return self.made


def compile_modules(cache: Path, nvcc: str, architecture: str = ARCHITECTURE) -> list[Step]:
    """PTX of each source that has kernels, compiled with the flags of the library's own build."""
    cmake = (CUDA / "CMakeLists.txt").read_text()
    listed = re.search(r"\$<\$<COMPILE_LANGUAGE:CUDA>:([^>]*)>", cmake)
    assert listed is not None
    flags = [flag for flag in listed.group(1).split(";") if not flag.startswith("-Xcompiler")]
    flags += ["-std=c++20", "-O3", "-DNDEBUG", f"-arch={architecture}", "-ptx"]
    common = _digest([nvcc, run_command([nvcc, "--version"]), *flags], _headers())
    return [
        Step(cache / f"{source.stem}-{_digest([common], [source])}.ptx", [nvcc, *flags, str(source)])
        for source in sorted(CUDA.glob("*.cu"))
    ]


def compile_objects(cache: Path, compiler: list[str]) -> list[Step]:
    """The interpreter, and the host's half of the GPU library."""
    machine = run_command([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull])
    common = [*compiler, run_command([*compiler, "--version"]), machine]
    jobs = [(source, INTERPRETER, sorted(HERE.glob("*.h"))) for source in sorted(HERE.glob("*.cpp"))]
    host = [*_headers(), HERE / "launch_hook.h"]
    jobs += [(source, HOST, host) for source in sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cpp")])]
    return [
        Step(
            cache / f"{source.stem}-{_digest([*common, *flags], [*headers, source])}.o",
            [*compiler, *flags, "-c", str(source)],
        )
        for source, flags, headers in jobs
    ]


def open_ptx(cache: Path) -> PtxLibrary:
    """Two compilers at a time; one process builds, others wait for it."""
    cache.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    with (cache / "lock").open("w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        steps = [compile_modules(cache, find_nvcc()), compile_objects(cache, compiler)]
        modules, objects = (list(made) for made in [pool.map(Step.run, of) for of in steps])
        link = [*compiler, "-shared", *map(str, objects)]
        library = Step(cache / f"{_digest(objects, [])}.so", link).run()
    return PtxLibrary(library, [path.read_text() for path in modules])


def _headers() -> list[Path]:
    return sorted((REPOSITORY / "csrc").rglob("*.h"))


def _digest(texts: Sequence[object], files: Sequence[Path]) -> str:
    digest = blake3.blake3(repr([str(text) for text in texts]).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]
