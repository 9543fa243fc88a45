"""The interpreter of PTX can fail: kernels whose PTX was changed give other bytes, or are stopped, and it is said why.

These tests run with the plugin backend.py (`make test-kernels`), which needs nvcc.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

if "device.ptx.backend" not in sys.modules:
    pytest.skip("these tests need nvcc: `make test-kernels`", allow_module_level=True)

from device.ptx.backend import opened
from device.ptx.library import AT_RANDOM, LOWEST_FIRST, PtxDevice, PtxError
from device.ptx.work import WORK


@dataclass(frozen=True, slots=True)
class Change:
    """A regular expression, what takes its place (everywhere, or in the first match), and what comes of it."""

    work: str
    entry: str
    find: str
    instead: str
    fault: str = ""
    """Part of what is said; without it the results are other ones."""
    count: int = 0
    orders: int = 0
    """How many random orders are tried; 0: lowest first."""


CHANGES = {
    "a shuffle from other lanes": Change("scalable_encode", "PrepareTokens", r"shfl\.sync\.bfly", "shfl.sync.down"),
    "a ballot without negation": Change(
        "lossless_decode", "LosslessDecode", r"(vote\.sync\.)ballot(\.b32 \t%r\d+, )(%p\d+)", r"\1ballot\2!\3", count=1
    ),
    "floats that become other halves": Change(
        "scalable_encode", "PrepareTokens", r"cvt\.rn\.f16\.f32", "cvt.rn.bf16.f32"
    ),
    "halves of a pair exchanged": Change(
        "scalable_decode",
        "MultiplyTilesILNS_11DeviceDtypeE1",
        r"(cvt\.rn\.bf16x2\.f32 %r\d+, )(%f\d+), (%f\d+)",
        r"\1\3, \2",
    ),
    "a matrix that is not turned": Change(
        "scalable_decode", "MultiplyTilesILNS_11DeviceDtypeE1", r"ldmatrix(\S+)\.trans", r"ldmatrix\1"
    ),
    "operands of a product exchanged": Change(
        "scalable_decode",
        "MultiplyTilesILNS_11DeviceDtypeE1",
        r"(mma\S+ \{[^}]*\}, \{[^}]*\}, \{)(%r\d+), (%r\d+)",
        r"\1\3, \2",
    ),
    "a copy that is not waited for": Change(
        "scalable_decode",
        "MultiplyTilesILNS_11DeviceDtypeE1",
        r"cp\.async\.wait_group \d+",
        "cp.async.wait_group 7",
        "may not have arrived",
    ),
    "rows that no barrier keeps apart": Change("scalable_encode", "MultiplyTokens", r"bar\.sync[ \t]+0;", "", orders=4),
    "lanes that do not wait for the warp": Change(
        "lossless_encode", "LosslessClass", r"bar\.warp\.sync[ \t]+-?\d+;", "", orders=8
    ),
    "lanes that wait at different places": Change(
        "lossless_decode",
        "LosslessDecode",
        r"(\tbar\.warp\.sync[ \t]+-1;)",
        "{.reg .pred odd; .reg .b32 own; mov.u32 own, %laneid; setp.gt.u32 odd, own, 4;\n@odd bra $L__apart; \n"
        "bar.warp.sync -1; $L__apart: }\n\\1",
        "at different places",
        count=1,
    ),
    "lanes that end while others wait": Change(
        "lossless_decode",
        "LosslessDecode",
        r"(\tbar\.warp\.sync[ \t]+-1;)",
        "{.reg .pred odd; .reg .b32 own; mov.u32 own, %laneid; setp.gt.u32 odd, own, 4;\n@odd ret; }\n\\1",
        "have ended",
        count=1,
    ),
    "an address behind a buffer": Change(
        "lossless_encode",
        "LosslessAssemble",
        r"(st\.(?:global\.)?u\d+[ \t]+\[%rd\d+)(?:\+\d+)?\]",
        r"\1+1099511627776]",
        "no memory",
    ),
    "an address that is not aligned": Change(
        "lossless_decode", "LosslessDecode", r"(ld\.shared\.u32 %r\d+, \[%r\d+)\]", r"\1+1]", "not aligned", count=1
    ),
    "shared memory that the block does not have": Change(
        "lossless_decode",
        "LosslessDecode",
        r"(ld\.shared\.u32 %r\d+, \[%r\d+)\]",
        r"\1+262144]",
        "outside of shared memory",
    ),
    "a register that was never written": Change(
        "lossless_decode", "LosslessDecode", r"\tmov\.u32 \t%r\d+, %tid\.x;", "", "never written"
    ),
    "a table that is written to": Change(
        "lossless_decode",
        "LosslessDecode",
        r"(\tmov\.u64 \t(%rd\d+), \S*kDecodeEntries\w*;)",
        r"\1 st.global.u32 [\2], 0;",
        "a constant",
    ),
    "a loop without an end": Change(
        "lossless_decode", "LosslessDecode", r"\n(\$L__BB\d+_3):", r"\n\1: bra \1;", "does not end"
    ),
}


@pytest.fixture
def ordinary() -> PtxDevice:
    return opened[0]


def change_entry(modules: list[str], change: Change) -> list[str]:
    """Of the first kernel that is called so."""
    changed = []
    for text in modules:
        begin = re.search(rf"\.entry \w*{change.entry}\w*\(", text)
        end = text.find("\n}", begin.end()) if begin else 0
        if not begin:
            changed.append(text)
            continue
        body, count = re.subn(change.find, change.instead, text[begin.start() : end], count=change.count)
        assert count, "there is nothing to change: nvcc writes it otherwise now"
        changed.append(text[: begin.start()] + body + text[end:])
    assert changed != modules
    return changed


def run(ordinary: PtxDevice, folder: Path, change: Change) -> list[bytes]:
    device = PtxDevice(ordinary.ptx.copy(folder, change_entry(ordinary.ptx.modules, change)))
    device.ptx.set_most(20_000_000)
    results = []
    with device.ptx.expecting_faults():
        for seed in range(max(change.orders, 1)):
            device.ptx.set_order(AT_RANDOM if change.orders else LOWEST_FIRST, seed)
            results.append(WORK[change.work](device))
    return results


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_kernel_is_found_out(device: PtxDevice, ordinary: PtxDevice, tmp_path: Path, name: str) -> None:
    change = CHANGES[name]
    expected = WORK[change.work](ordinary)
    if change.fault:
        with pytest.raises(PtxError, match=change.fault):
            run(ordinary, tmp_path, change)
    else:
        assert any(result != expected for result in run(ordinary, tmp_path, change))


def test_orders_do_not_matter_to_kernels_as_they_are(device: PtxDevice, ordinary: PtxDevice, tmp_path: Path) -> None:
    expected = {name: work(ordinary) for name, work in WORK.items()}
    other = PtxDevice(ordinary.ptx.copy(tmp_path, ordinary.ptx.modules))
    for seed in range(4):
        other.ptx.set_order(AT_RANDOM, seed)
        assert {name: work(other) for name, work in WORK.items()} == expected


def test_statements_that_are_not_known_are_named(ordinary: PtxDevice, device: PtxDevice, tmp_path: Path) -> None:
    modules = [text.replace("popc.b32", "popc.b33") for text in ordinary.ptx.modules]
    with pytest.raises(PtxError, match=r"not understood: popc\.b33"):
        ordinary.ptx.copy(tmp_path, modules)
