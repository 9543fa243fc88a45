"""What there is: GPU, torch, compilers; and the machine code that the GPU needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LEAST_CAPABILITY = (8, 0)
WITHOUT_A_GPU = (9, 0)
"""The compute capability that is compiled for where there is none."""

PROBE = """
import ctypes, json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
device = torch.cuda.get_device_properties(0) if count else None
driver = ctypes.c_int()
if count:
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
print(json.dumps({"torch": f"{torch.__version__} (CUDA {torch.version.cuda})", "gpus": count,
                  "gpu": device.name if count else None, "capability": [device.major, device.minor] if count else [],
                  "driver": f"CUDA {driver.value // 1000}.{driver.value % 1000 // 10}" if count else None}))
"""


@dataclass
class Machine:
    python: str = sys.version.split()[0]
    torch: str | None = None
    gpu: str | None = None
    gpus: int = 0
    capability: Sequence[int] = ()
    driver: str | None = None
    nvcc: str | None = None
    nvcc_version: str | None = None
    compiler: str | None = None
    sanitizer: str | None = None

    def describe(self) -> dict[str, Any]:
        """All of it, but programs by their names: where they lie is nobody's concern."""
        places = ("nvcc", "compiler", "sanitizer")
        return {name: Path(value).name if name in places and value else value for name, value in asdict(self).items()}

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", (self.gpu or "none").lower()).strip("-")


def look() -> Machine:
    """Say and answer what there is. Of several GPUs all steps see the first alone."""
    machine = Machine(**probe_torch())
    if machine.gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
        print(f"{machine.gpus} GPUs; CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} from here on")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"), reverse=True)
    places = os.pathsep.join([f"{home}/bin", os.environ.get("PATH", ""), "/usr/local/cuda/bin", *map(str, packaged)])
    machine.nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=places)
    machine.nvcc_version = ask_version(machine.nvcc)
    beside = os.pathsep.join([str(Path(machine.nvcc).parent), places]) if machine.nvcc else places
    machine.sanitizer = shutil.which("compute-sanitizer", path=beside)
    machine.compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    print(f"python {machine.python}, {sys.executable}\ntorch {machine.torch}")
    print(f"GPU {machine.gpu} {list(machine.capability)}, driver {machine.driver}")
    print(f"nvcc {machine.nvcc} {machine.nvcc_version}\nc++ {machine.compiler}\nsanitizer {machine.sanitizer}")
    return machine


def probe_torch() -> dict[str, Any]:
    """A driver that hangs is no GPU."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False, timeout=90, env=outside()
        )
    except subprocess.TimeoutExpired:
        print("torch does not say in 90 s whether there is a GPU")
        return {}
    answer = dict(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else {}
    if not answer.get("gpus"):  # torch warns of a driver that is too old
        print("\n".join(done.stderr.strip().splitlines()[-3:]))
    return answer


def outside() -> dict[str, str]:
    """The environment for programs that are to see nothing of this checkout."""
    return {**os.environ, "PYTHONSAFEPATH": "1"}


def ask_version(nvcc: str | None) -> str | None:
    found = re.search(r"release ([\d.]+)", ask(nvcc, "--version"))
    return found[1] if found else None


def ask(program: str | None, option: str) -> str:
    """What it prints; nothing where it does not run."""
    if program is None:
        return ""
    try:
        return subprocess.run([program, option], capture_output=True, text=True, check=False, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def choose_code(machine: Machine) -> str | None:
    """nvcc's option for this GPU; None where no code that this nvcc makes runs on it."""
    numbers = (
        {int(number) for number in re.findall(rf"{kind}_(\d+)\b", ask(machine.nvcc, option))}
        for kind, option in (("sm", "--list-gpu-code"), ("compute", "--list-gpu-arch"))
    )
    return pick_code(machine.capability or WITHOUT_A_GPU, *numbers)


def pick_code(capability: Sequence[int], codes: set[int], architectures: set[int]) -> str | None:
    """Machine code for the GPU or an older one of its kind, else PTX, which the driver compiles.

    `codes` and `architectures` are what nvcc lists, such as 90. Machine code runs on the same major version from its
    own minor version on.
    """
    major, minor = capability
    alike = [code for code in codes if 10 * major <= code <= 10 * major + minor]
    older = [one for one in architectures if one <= 10 * major + minor]
    if tuple(capability) < LEAST_CAPABILITY or not (alike or older):
        return None
    if alike:
        return f"-gencode=arch=compute_{max(alike)},code=sm_{max(alike)}"
    return f"-gencode=arch=compute_{max(older)},code=compute_{max(older)}"
