"""Where things lie: all that is written is below build/gpu, but for the results."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
BUILD = REPOSITORY / "build" / "gpu"
SITE, WHEELS, STAND_INS = BUILD / "site", BUILD / "wheels", BUILD / "stand-ins"
OBJECTS, LOGS = BUILD / "objects", BUILD / "logs"
RESULTS = REPOSITORY / "benchmarks" / "results"
TESTS = REPOSITORY / "tests" / "device"
EMULATION = BUILD / "pytest-cache" / "d" / "kernels"
"""Where the tests keep the kernels' emulation (`pytestconfig.cache.mkdir("kernels")`)."""
