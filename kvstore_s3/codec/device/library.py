"""The C interface of the GPU code (csrc/cuda/api.h), by ctypes: one build serves every torch, and none is needed here.

The library exists twice: `_cuda.so`, which nvcc builds beside this package, and its emulation, which runs the same
kernels on the host. Whoever loads it says which of the two it is.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kvstore_s3
from kvstore_s3.errors import DeviceError

LIBRARY_NAME = "_cuda.so"

LOSSLESS_JOB = np.dtype(
    [
        ("stream", np.uint64),
        ("length", np.uint32),
        ("tokens", np.uint32),
        ("token_begin", np.uint32),
        ("layer_begin", np.uint32),
        ("layers", np.uint16),
        ("kind_begin", np.uint8),
        ("kinds", np.uint8),
        ("head", np.uint32),
    ],
    align=True,
)
"""`KvsLosslessJob`: one head's stream, 32 bytes."""

LOSSLESS_ENCODE_JOB = np.dtype(
    [
        ("payload", np.uint64),
        ("scratch", np.uint64),
        ("tokens", np.uint32),
        ("token_begin", np.uint32),
        ("layer_begin", np.uint32),
        ("head", np.uint32),
        ("heads", np.uint32),
        ("index", np.uint32),
        ("layers", np.uint16),
        ("kind_begin", np.uint8),
        ("kinds", np.uint8),
        ("reserved", np.uint32),
    ],
    align=True,
)
"""`KvsLosslessEncodeJob`: one head of a section, 48 bytes."""


class Pages(ctypes.Structure):
    """`KvsPages`: where values lie in the device's memory. Addresses are integers; strides count elements."""

    _fields_ = (
        ("planes", ctypes.c_uint64),
        ("block_table", ctypes.c_uint64),
        ("block_tokens", ctypes.c_uint32),
        ("dim", ctypes.c_uint32),
        ("block_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    )


_SIGNATURES: dict[str, tuple[type, ...]] = {
    "kvs_lossless_decode": (
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.POINTER(Pages),
        ctypes.c_void_p,
        ctypes.c_void_p,
    ),
    "kvs_lossless_encode": (
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.POINTER(Pages),
        ctypes.c_void_p,
        ctypes.c_void_p,
    ),
    "kvs_lossless_encode_scratch": (ctypes.c_uint64, ctypes.c_uint64),
    "kvs_limit_multiprocessors": (ctypes.c_uint32,),
    "kvs_probe": (),
}
"""Argument types of the calls that this package makes by `Library.call`; others are given as ctypes values."""


_KNOWN_FAULTS = {
    2: "the GPU's memory is full, so that kernels cannot be loaded; leave some free, and open the store again",
    35: "the driver is older than the CUDA runtime in the library; take a newer one, or build with an older nvcc",
    100: "there is no GPU",
    209: "the library has no code for this GPU; build it again with KVSTORE_S3_CUDA_ARCHITECTURES",
}


class Library:
    """The calls of one built library. Safe for several threads."""

    def __init__(self, path: Path, *, emulated: bool = False) -> None:
        """Load `path`. `emulated`: its kernels run on the host, and its pointers are the host's.

        Raises `DeviceError` where it cannot be loaded.
        """
        self.path = path
        self.emulated = emulated
        try:
            self._calls = ctypes.CDLL(str(path))
        except OSError as error:
            raise DeviceError(f"{path} cannot be loaded ({error}); build it again") from error
        for name, types in _SIGNATURES.items():
            if self.has(name):
                getattr(self._calls, name).argtypes = types
        if self.has("kvs_lossless_encode_scratch"):
            self._calls.kvs_lossless_encode_scratch.restype = ctypes.c_uint64

    def has(self, name: str) -> bool:
        """Whether the library has a function of this name: one built earlier may lack it."""
        return hasattr(self._calls, name)

    def call(self, name: str, *arguments: object) -> None:
        """Call `name`, which answers 0 or a CUDA error. Raises `DeviceError` with that. Releases the GIL."""
        if not self.has(name):
            raise DeviceError(f"{self.path} has no {name}: it is older than this package; build it again")
        fault = getattr(self._calls, name)(*arguments)
        if fault:
            raise DeviceError(f"{name} failed with CUDA error {fault}")

    def lossless_decode(self, jobs: int, count: int, pages: Pages, faults: int, stream: int) -> None:
        """Queue the decoding of `count` heads of codec 1 on `stream` (a cudaStream_t as an integer).

        `jobs` is the device address of `count` `LOSSLESS_JOB`, `faults` that of `count` uint32, which get a
        `BitstreamFault` for each job, 0 where it is good. The planes and the block table in `pages` are device
        addresses; `pages` itself may be forgotten after the call.
        """
        self.call("kvs_lossless_decode", jobs, count, ctypes.byref(pages), faults, stream)

    def lossless_encode(self, jobs: int, count: int, pages: Pages, lengths: int, stream: int) -> None:
        """Queue the encoding of `count` heads in codec 1 on `stream`, as `lossless_decode` does.

        `jobs` is the device address of `count` `LOSSLESS_ENCODE_JOB`, `lengths` that of `count` uint32, which get the
        bytes of each head's stream.
        """
        self.call("kvs_lossless_encode", jobs, count, ctypes.byref(pages), lengths, stream)

    def lossless_encode_scratch(self, components: int, tokens: int) -> int:
        """Bytes of scratch that `lossless_encode` needs for a head of so many components (layers x kinds x dim)."""
        return int(self._calls.kvs_lossless_encode_scratch(components, tokens))

    def why_not(self) -> str | None:
        """Why kernels cannot run on the device that is current in the calling thread; None where they can."""
        if not self.has("kvs_probe"):
            return f"{self.path} is older than this package; build it again"
        fault = int(self._calls.kvs_probe())
        return (
            None if fault == 0 else f"{_KNOWN_FAULTS.get(fault, 'the library does not run there')} (CUDA error {fault})"
        )

    def limit_multiprocessors(self, most: int) -> None:
        """Let calls from now on, of the whole process, fill no more than `most` multiprocessors; 0: all there are."""
        self.call("kvs_limit_multiprocessors", most)


@dataclass(frozen=True, slots=True)
class Found:
    """The library that was looked for, or None with the reason."""

    library: Library | None
    reason: str


def find_library() -> Found:
    """The GPU library that was built with this package. Does not ask whether there is a GPU; touches none."""
    for folder in kvstore_s3.__path__:
        path = Path(folder) / LIBRARY_NAME
        if path.is_file():
            return _load(path)
    return Found(None, f"{LIBRARY_NAME} was not built: no CUDA compiler was there when the package was installed")


def _load(path: Path) -> Found:
    try:
        return Found(Library(path), str(path))
    except DeviceError as error:
        return Found(None, str(error))
