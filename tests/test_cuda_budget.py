"""The reader of the CUDA compiler's reports, `.ci/cuda-budget`: what it must notice."""

from __future__ import annotations

import shutil
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "cuda-budget"

REPORT = """\
[1/3] Building CUDA object CMakeFiles/_cuda.dir/decode.cu.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3kvs10run_kernelINS_12_GLOBAL__N_16DecodeILj3EEEEEvT_' for 'sm_80'
ptxas info    : Function properties for _ZN3kvs10run_kernelINS_12_GLOBAL__N_16DecodeILj3EEEEEvT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 440 bytes cmem[0]
ptxas info    : Compile time = 10.0 ms
ptxas info    : Compiling entry function '_ZN3kvs10run_kernelINS_12_GLOBAL__N_16DecodeILj3EEEEEvT_' for 'sm_90'
ptxas info    : Function properties for _ZN3kvs10run_kernelINS_12_GLOBAL__N_16DecodeILj3EEEEEvT_
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 440 bytes cmem[0]
"""


@pytest.fixture(scope="module")
def budget() -> ModuleType:
    if shutil.which("c++filt") is None:
        pytest.skip("needs c++filt, which comes with the C++ compiler (binutils)")
    spec = spec_from_loader("cuda_budget", SourceFileLoader("cuda_budget", str(SCRIPT)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["cuda_budget"] = module  # dataclasses look their module up
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def kernel(budget: ModuleType, shared: int = 0, resident: int = 1, **use: int) -> Any:
    return budget.Kernel(
        128, resident, shared, {"sm_90": budget.Use(**{"registers": 40, "stack": 0, "spills": 0, **use})}
    )


def test_registers_and_spills_are_read_by_kernel_and_architecture(budget: ModuleType) -> None:
    kernels, functors = budget.parse_report(REPORT)
    assert kernels["Decode<3>"].uses == {"sm_80": budget.Use(40, 0, 0), "sm_90": budget.Use(64, 16, 12)}
    assert functors == {"decode.cu": {"Decode<3>": "kvs::Decode<3u>"}}


def test_static_shared_memory_is_refused(budget: ModuleType) -> None:
    with pytest.raises(SystemExit, match="static shared memory"):
        budget.parse_report(REPORT.replace("used 1 barriers", "used 1 barriers, 512 bytes smem"))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"registers": 41}, "registers 41"),
        ({"spills": 4}, "spills 4"),
        ({"stack": 8}, "stack 8"),
        ({"shared": 1}, "1 bytes"),
    ],
)
def test_a_kernel_that_takes_more_than_recorded_is_named(budget: ModuleType, more: dict[str, int], named: str) -> None:
    recorded = {"Decode": kernel(budget)}
    assert budget.compare({"Decode": kernel(budget)}, recorded) == []
    assert budget.compare({"Decode": kernel(budget, registers=39)}, recorded) == []
    (fault,) = budget.compare({"Decode": kernel(budget, **more)}, recorded)
    assert "Decode" in fault
    assert named in fault


def test_kernels_that_are_new_or_gone_are_named(budget: ModuleType) -> None:
    gone, new = budget.compare({"New": kernel(budget)}, {"Old": kernel(budget)})
    assert gone.startswith("Old: no longer there")
    assert new.startswith("New: not in the budget")


def test_architectures_that_are_no_longer_compiled_for_are_named(budget: ModuleType) -> None:
    recorded = {"Decode": kernel(budget)}
    recorded["Decode"].uses["sm_80"] = budget.Use(40, 0, 0)
    (fault,) = budget.compare({"Decode": kernel(budget)}, recorded)
    assert fault == "Decode: not compiled for sm_80 any more"
    targets = ["compute_100", "sm_80", "sm_90"]
    assert budget.compare_targets(targets, targets) == []
    assert budget.compare_targets(["sm_80", "sm_90"], targets) == ["nothing was compiled for compute_100 any more"]
    assert budget.compare_targets([*targets, "sm_75"], targets) == ["sm_75: compiled for, but not in the budget"]


def test_blocks_that_do_not_fit_together_are_named(budget: ModuleType) -> None:
    assert budget.check_shared({"DecodeLevels": kernel(budget, shared=113 * 1024, resident=2)}) == []
    assert budget.check_shared({"DecodeLevels": kernel(budget, shared=114 * 1024, resident=2)}) != []


def test_blocks_that_smaller_devices_refuse_are_named(budget: ModuleType) -> None:
    assert budget.check_shared({"Decode": kernel(budget, shared=99 * 1024)}) == []
    assert budget.check_shared({"Decode": kernel(budget, shared=100 * 1024)}) != []
    assert budget.check_shared({"DecodeLevels": kernel(budget, shared=100 * 1024)}) == []
