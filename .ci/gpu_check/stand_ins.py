"""Python packages that are not here, and the files in .ci/gpu-stand-ins that do their work for tests and benchmarks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from .machine import outside
from .places import REPOSITORY, STAND_INS, WHEELS

STAND_INS_SOURCE = REPOSITORY / ".ci" / "gpu-stand-ins"
NEEDED = ("torch", "numpy")
"""What nothing stands in for."""
FILES = {
    "aiofiles": ("aiofiles.py",),
    "blake3": ("blake3.py",),
    "hypothesis": ("hypothesis.py",),
    "nanobind": (),  # headers, which are taken from where they are
    "pydantic": ("pydantic.py",),
    "pydantic_core": ("pydantic_core.py",),
    "pydantic_settings": ("pydantic_settings.py",),
    "pytest": ("pytest.py", "run_tests.py"),
    "pytest_asyncio": ("async_tests.py",),
    "safetensors": ("safetensors.py",),
    "xxhash": ("xxhash.py",),
    "zstandard": ("zstandard.py",),
}
BY_DIGESTS = {"blake3", "xxhash"}
"""Stand-ins that need _digests."""
BUILT_IN = {"pytest_asyncio": "pytest"}
"""What the stand-in for the second does by itself."""

PROBE = """
import importlib.util, json, sys
def place(name):
    found = importlib.util.find_spec(name)
    return found.origin if found else None
print(json.dumps({name: place(name) for name in sys.argv[1:]}))
"""


def find_packages() -> dict[str, Path | None]:
    """The folder of each package, or of its one file; None where it is not here. Wheels that were brought count."""
    environment = {**outside(), "PYTHONPATH": path_of(WHEELS)}
    names = [*NEEDED, *FILES, "transformers"]
    probe = [sys.executable, "-c", PROBE, *names]
    done = subprocess.run(probe, capture_output=True, text=True, check=True, env=environment)
    places: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return {name: Path(place).parent if place else None for name, place in places.items()}


def lay_out(packages: Mapping[str, Path | None]) -> list[str]:
    """Copy the stand-ins for what is missing to build/gpu/stand-ins, and answer their names."""
    shutil.rmtree(STAND_INS, ignore_errors=True)
    STAND_INS.mkdir(parents=True)
    used = [name for name in FILES if packages[name] is None]
    used = [name for name in used if BUILT_IN.get(name) not in used]
    for file in (file for name in used for file in FILES[name]):
        shutil.copy(STAND_INS_SOURCE / file, STAND_INS)
    return used


def path_of(*folders: Path) -> str:
    """For PYTHONPATH, before what it has."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
