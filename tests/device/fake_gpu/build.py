"""The fake runtime as a library to preload. It is the driver's, too: `libcuda.so.1` is the name that torch asks for."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from device.emulated import find_compiler
from device.ptx.library import Step, find_nvcc

SOURCE = Path(__file__).with_name("runtime.cpp")
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-fvisibility=hidden"]
LINK = ["-shared", "-Wl,-soname,libcuda.so.1"]


def find_headers() -> Path | None:
    """The CUDA runtime's, beside nvcc. Raises `RuntimeError` where nvcc is neither here nor can be fetched."""
    root = Path(find_nvcc()).resolve().parent.parent
    found = [folder for folder in (root / "include", *root.glob("targets/*/include")) if _api(folder).is_file()]
    return found[0] if found else None


def read_version(headers: Path) -> str:
    """As torch writes it: 13.0."""
    found = re.search(r"#define CUDART_VERSION\s+(\d+)", _api(headers).read_text())
    assert found is not None
    major, rest = divmod(int(found.group(1)), 1000)
    return f"{major}.{rest // 10}"


def build_runtime(cache: Path, headers: Path) -> Path:
    command = [*find_compiler(), *FLAGS, *LINK, f"-I{headers}", str(SOURCE)]
    digest = hashlib.blake2b(repr([command, read_version(headers)]).encode() + SOURCE.read_bytes()).hexdigest()[:24]
    return Step(cache / f"fake-runtime-{digest}.so", command).run()


def _api(headers: Path) -> Path:
    return headers / "cuda_runtime_api.h"
