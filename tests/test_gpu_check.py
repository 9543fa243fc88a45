"""The parts of `make gpu-check`: no step hides another, and what is compiled is what CMake compiles."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODES = {75, 80, 86, 87, 89, 90, 100, 103, 120}


def part(name: str) -> ModuleType:
    """`.ci/gpu_check` is on no path."""
    if "gpu_check" not in sys.modules:
        place = ROOT / ".ci" / "gpu_check" / "__init__.py"
        spec = importlib.util.spec_from_file_location(
            "gpu_check", place, submodule_search_locations=[str(place.parent)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules["gpu_check"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["gpu_check"])
    return importlib.import_module(f"gpu_check.{name}")


@pytest.mark.parametrize(
    ("capability", "codes", "expected"),
    [
        ((9, 0), CODES, "-gencode=arch=compute_90,code=sm_90"),
        ((8, 9), CODES, "-gencode=arch=compute_89,code=sm_89"),
        ((8, 9), {80, 86, 90}, "-gencode=arch=compute_86,code=sm_86"),
        ((10, 3), {80, 90, 100}, "-gencode=arch=compute_100,code=sm_100"),
        ((10, 0), {80, 90, 103}, "-gencode=arch=compute_90,code=compute_90"),
        ((12, 0), {80, 90}, "-gencode=arch=compute_90,code=compute_90"),
        ((13, 1), CODES, "-gencode=arch=compute_120,code=compute_120"),
        ((7, 5), CODES, None),
        ((8, 0), {90, 100}, None),
    ],
)
def test_a_gpu_gets_code_that_runs_on_it(capability: Sequence[int], codes: set[int], expected: str | None) -> None:
    assert part("machine").pick_code(capability, codes, codes) == expected


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    steps = part("steps")
    for name in ("BUILD", "LOGS", "RESULTS"):
        monkeypatch.setattr(steps, name, tmp_path)
    return steps.Run(part("machine").Machine(gpu="Some GPU", capability=(9, 0), nvcc="/here/nvcc"))


def states(run: object) -> dict[str, str]:
    return {one.step: one.state for one in run.outcomes}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_no_step_hides_another_and_all_are_kept(run: object, tmp_path: Path) -> None:
    run.do("good", python("print('fine')"), limit=20)
    run.do("bad", python("raise SystemExit('broken')"), limit=20)
    run.do("absent", ["/no/such/program"], limit=20)
    run.do("endless", python("import time; time.sleep(60)"), limit=0.5)
    run.do("without", python(""), limit=20, lacks=["a part"])
    run.do("last", python(""), limit=20)
    expected = {"good": "passed", "bad": "failed", "absent": "failed", "endless": "stopped", "without": "lacking"}
    assert states(run) == expected | {"last": "passed"}
    kept = json.loads((tmp_path / "gpu-some-gpu.json").read_text())["checks"]
    assert {name: step["state"] for name, step in kept["steps"].items()} == states(run)
    assert kept["steps"]["good"]["detail"] == "fine"
    assert kept["nvcc"] == "nvcc"


def test_a_step_that_is_stopped_says_what_it_has_and_ends_what_it_started(run: object, tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stderr=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\n"
        "try:\n    time.sleep(60)\nfinally:\n    print('figures so far', flush=True)"
    )
    run.do("measured", python(code), limit=10)
    said = (tmp_path / "measured.log").read_text().split("\n")
    assert states(run) == {"measured": "stopped"}
    assert "figures so far" in said
    for _ in range(100):
        try:
            os.kill(int(said[0]), 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{said[0]}/stat").read_text().split()[2] == "Z":  # nobody waits for orphans in some containers
            return
        time.sleep(0.05)
    raise AssertionError("the step's child is still there")


def test_steps_at_once_share_their_time_and_each_is_kept(run: object) -> None:
    commands = {str(number): python("import time; time.sleep(60)" if number == 1 else "") for number in range(4)}
    assert not run.do_all(commands, limit=5, workers=2)
    assert states(run) == {"0": "passed", "1": "stopped", "2": "passed", "3": "passed"}


def test_figures_of_an_earlier_run_are_not_taken_for_this_ones(run: object, tmp_path: Path) -> None:
    (tmp_path / "gpu-some-gpu.json").write_text('{"codec": [1]}')
    run.begin_results()
    run.do("good", python(""), limit=20)
    assert "codec" not in json.loads((tmp_path / "gpu-some-gpu.json").read_text())
    assert (tmp_path / "gpu-some-gpu.before.json").read_text() == '{"codec": [1]}'


def test_what_a_step_wrote_stays_beside_the_outcomes(run: object, tmp_path: Path) -> None:
    kept = tmp_path / "gpu-some-gpu.json"
    run.do("benchmark", python(f"open({str(kept)!r}, 'w').write('{{\"codec\": [2]}}')"), limit=20)
    assert json.loads(kept.read_text())["codec"] == [2]
    assert "benchmark" in json.loads(kept.read_text())["checks"]["steps"]


def test_what_is_compiled_for_a_gpu_is_what_cmake_compiles() -> None:
    builds, machine = part("builds"), part("machine").Machine(nvcc="/no/nvcc", compiler="c++", capability=(9, 0))
    sources = {Path(command[command.index("-c") + 1]).name for command in builds.plan_gpu_library(machine).objects}
    files = [*(ROOT / "csrc/cuda").glob("*.cu"), *(ROOT / "csrc/cuda").glob("*.cpp")]
    assert sources == {file.name for file in files if not file.name.startswith("emulat")}
    text = (ROOT / "csrc/cuda/CMakeLists.txt").read_text()
    for flag in ("--expt-relaxed-constexpr", "-fmad=false", "-lineinfo", "-Xcompiler=-ffp-contract=off"):
        assert flag in text
        assert flag in builds.CUDA_FLAGS


def test_what_is_compiled_for_the_cpu_is_what_cmake_compiles() -> None:
    builds = part("builds")
    listed = set(builds.native_sources())
    files = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc/cpu").glob("*.cpp")]
    assert listed == {str(file.relative_to(ROOT / "csrc")) for file in files}
    text = (ROOT / "csrc/CMakeLists.txt").read_text()
    for flag in ("-ffp-contract=off", "-O3", "-DNDEBUG"):
        assert flag in text
        assert flag in builds.CXX_FLAGS


def test_without_a_compiler_or_headers_the_build_says_what_it_needs() -> None:
    builds, machine = part("builds"), part("machine").Machine()
    assert builds.plan_gpu_library(machine).lacks == ["nvcc (CUDACXX, CUDA_HOME, PATH)", "a C++ compiler"]
    lacks = builds.plan_native(machine, {"nanobind": None, "torch": None}).lacks
    assert "a C++ compiler" in lacks
    assert "nanobind, or a torch that brings pybind11" in lacks


def test_every_stand_in_has_its_files() -> None:
    stand_ins = part("stand_ins")
    files = {file for files in stand_ins.FILES.values() for file in files}
    assert all((stand_ins.STAND_INS_SOURCE / file).is_file() for file in files)
    assert {file.name for file in stand_ins.STAND_INS_SOURCE.glob("*.py")} == files
