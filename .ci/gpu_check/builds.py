"""Both halves of the native code, compiled file by file with the compilers alone: as CMake does, but for one GPU.

Sources and what matters of the options are those of csrc/CMakeLists.txt and csrc/cuda/CMakeLists.txt.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sysconfig
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .machine import Machine, choose_code
from .places import OBJECTS, REPOSITORY, SITE, STAND_INS
from .stand_ins import STAND_INS_SOURCE
from .steps import Command, Outcome, Run

CSRC = REPOSITORY / "csrc"
CXX_FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-ffp-contract=off")
CUDA_FLAGS = (
    *("-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-fmad=false", "-lineinfo", "-Xptxas=-v"),
    *("-Xcompiler=-Wall", "-Xcompiler=-ffp-contract=off", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden"),
)
QUIET_AVX512 = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")  # GCC bug 105593
NATIVE = "native codecs"
LEAST_NVCC = 12
"""For C++20; see csrc/cuda/find_nvcc.cmake."""
LIMIT = 180
"""Seconds for all of it."""


@dataclass(frozen=True)
class Target:
    """A shared library: a command for each object, then one that links."""

    name: str
    objects: Sequence[Command]
    link: Command
    lacks: Sequence[str] = ()


def build(run: Run, targets: Sequence[Target]) -> dict[str, bool]:
    """All at once, as many commands as there are processors; one that fails stops its own target alone."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    begin, end = time.monotonic(), time.monotonic() + LIMIT
    processors = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(processors) as pool, ThreadPoolExecutor(len(targets)) as links:
        found = {}
        for target in targets:
            if target.lacks:
                run.keep(Outcome(target.name, "lacking", 0.0, "needs " + ", ".join(target.lacks)))
                continue
            units = [
                pool.submit(run.build, f"{target.name} {Path(str(command[-1])).name}", [command], end)
                for command in target.objects
            ]
            found[target.name] = links.submit(link, run, target, units, begin, end)
        return {target.name: target.name in found and found[target.name].result() for target in targets}


def link(run: Run, target: Target, units: Sequence[Future[Outcome]], begin: float, end: float) -> bool:
    outcomes = [unit.result() for unit in units]
    worst = next((one for one in outcomes if one.state != "passed"), None)
    last = worst or run.build(f"{target.name} link", [target.link], end)
    detail = "" if last.state == "passed" else f"{last.step}: {last.detail}"
    return run.keep(Outcome(target.name, last.state, time.monotonic() - begin, detail))


def plan_gpu_library(machine: Machine) -> Target:
    """kvstore_s3/_cuda.so for this GPU alone."""
    code = choose_code(machine)
    capability = ".".join(map(str, machine.capability))
    lacks = missing((machine.nvcc, "nvcc (CUDACXX, CUDA_HOME, PATH)"), (machine.compiler, "a C++ compiler"))
    if machine.nvcc and int((machine.nvcc_version or "0").split(".")[0]) < LEAST_NVCC:
        lacks.append(f"nvcc {LEAST_NVCC} or newer, not {machine.nvcc_version}")
    elif machine.nvcc and code is None:
        lacks.append(f"an nvcc for compute capability {capability}, which must be 8.0 or more ({machine.nvcc_version})")
    compiler = shlex.split(machine.compiler or "c++")
    nvcc = [machine.nvcc, *(["-ccbin", compiler[0]] if os.environ.get("CXX") else [])]
    kernels = [[*nvcc, *CUDA_FLAGS, code, "-c", source] for source in sorted((CSRC / "cuda").glob("*.cu"))]
    hosts = [[*compiler, *CXX_FLAGS, "-c", source] for source in sorted((CSRC / "cuda").glob("*.cpp"))]
    objects = [[*command, "-o", object_of(command[-1])] for command in [*kernels, *leave_out_emulation(hosts)]]
    files = [command[-1] for command in objects]
    libraries = [f"-L{folder}" for folder in packaged_libraries(machine.nvcc)]
    output = SITE / "kvstore_s3" / "_cuda.so"
    return Target(
        "GPU library",
        objects,
        [*nvcc, "-shared", "-cudart=static", code, *libraries, *files, "-o", output],
        lacks,
    )


def leave_out_emulation(commands: list[list[object]]) -> list[list[object]]:
    return [command for command in commands if not re.match(r"emulat[a-z]*\.", Path(str(command[-1])).name)]


def packaged_libraries(nvcc: str | None) -> list[Path]:
    """PyPI's packages keep in lib what nvcc looks for in lib64."""
    if nvcc is None:
        return []
    home = Path(nvcc).resolve().parent.parent
    return [home / "lib"] if not (home / "lib64").exists() and (home / "lib" / "libcudart_static.a").exists() else []


def plan_native(machine: Machine, packages: Mapping[str, Path | None]) -> Target:
    """kvstore_s3/_native, for this Python; its bindings by nanobind, or by torch's pybind11.

    `packages` are the folders of nanobind and torch, None where they are not there.
    """
    nanobind, torch = packages["nanobind"], packages["torch"]
    python = Path(sysconfig.get_path("include"))
    pybind = torch / "include" / "pybind11" if torch else None
    lacks = missing(
        (machine.compiler, "a C++ compiler"),
        ((python / "Python.h").exists(), f"{python / 'Python.h'}"),
        (nanobind or (pybind and pybind.exists()), "nanobind, or a torch that brings pybind11"),
    )
    sources = [CSRC / name for name in native_sources()]
    include = ["-isystem", python]
    if nanobind:
        include += ["-isystem", nanobind / "include", "-isystem", nanobind / "ext" / "robin_map" / "include"]
        sources.append(nanobind / "src" / "nb_combined.cpp")
    elif torch:
        include += ["-isystem", STAND_INS_SOURCE, "-isystem", torch / "include"]
    compiler = shlex.split(machine.compiler or "c++")
    objects = [[*compiler, *CXX_FLAGS, *special_flags(source), *include, "-c", source] for source in longest(sources)]
    objects = [[*command, "-o", object_of(command[-1])] for command in objects]
    output = SITE / "kvstore_s3" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    files = [command[-1] for command in objects]
    return Target(NATIVE, objects, [*compiler, "-shared", *files, "-o", output], lacks)


def native_sources() -> list[str]:
    text = (CSRC / "CMakeLists.txt").read_text()
    listed = re.search(r"nanobind_add_module\((.*?)\)", text, re.DOTALL)
    if listed is None:
        raise ValueError("csrc/CMakeLists.txt names no sources of the native module")
    return re.findall(r"[\w/]+\.cpp", listed[1])


def longest(sources: Sequence[Path]) -> list[Path]:
    """Those with templates of bindings first."""
    return sorted(sources, key=lambda source: not source.name.startswith(("bindings", "nb_")))


def special_flags(source: Path) -> Sequence[str]:
    if source.name == "nb_combined.cpp":
        return ("-fno-strict-aliasing", "-w")
    return QUIET_AVX512 if source.stem.endswith("_avx512") else ()


def plan_digests(machine: Machine) -> Target:
    """The stand-ins' hashing, for this very processor."""
    python = Path(sysconfig.get_path("include"))
    lacks = missing((machine.compiler, "a C++ compiler"), ((python / "Python.h").exists(), f"{python / 'Python.h'}"))
    compiler, source = shlex.split(machine.compiler or "c++"), STAND_INS_SOURCE / "digests.cpp"
    built = object_of(source)
    return Target(
        "digests",
        [[*compiler, *CXX_FLAGS, "-march=native", "-isystem", python, "-c", source, "-o", built]],
        [*compiler, "-shared", built, "-o", STAND_INS / "_digests.so"],
        lacks,
    )


def object_of(source: object) -> Path:
    """Its name may be that of another folder's file."""
    path = Path(str(source))
    return OBJECTS / f"{path.parent.name}-{path.name}.o"


def missing(*facts: tuple[object, str]) -> list[str]:
    return [name for there, name in facts if not there]


def take_from_wheel(wheels: Path) -> bool:
    """Whether a wheel of this package brought the native module along."""
    for built in (wheels / "kvstore_s3").glob("_native*.so"):
        shutil.copy(built, SITE / "kvstore_s3")
        return True
    return False
