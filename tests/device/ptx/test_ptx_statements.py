"""Each statement of PTX against numpy: what the manual says of it, for numbers in corners and at random.

These tests run with the plugin backend.py (`make test-kernels`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

if "device.ptx.backend" not in sys.modules:
    pytest.skip("these tests need nvcc: `make test-kernels`", allow_module_level=True)

import torch
from device.ptx.library import PtxDevice, PtxError, PtxLibrary

Numbers = npt.NDArray[Any]
RNG = np.random.default_rng(2)
COUNT = 4096
TYPES = {
    **{
        f"{kind}{bits}": np.dtype(f"{'i' if kind == 's' else 'u'}{bits // 8}")
        for kind in "usb"
        for bits in (16, 32, 64)
    },
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
}
FRAME = """.version 8.0
.target sm_90
.address_size 64
.visible .entry _ZN3kvs10run_kernelINS_3OneEEEvT_(
.param .align 8 .b8 argument[32]
)
.maxntid 1024, 1, 1
{
.reg .pred %p<8>;
.reg .b16 %h<8>;
.reg .b32 %r<8>;
.reg .b64 %d<8>;
.reg .b64 %at<8>;
.reg .b32 %n;
.reg .b64 %wide;
mov.u32 %n, %tid.x;
cvt.u64.u32 %wide, %n;
"""


@pytest.fixture(scope="module")
def single(device: PtxDevice, tmp_path_factory: pytest.TempPathFactory) -> PtxDevice:
    return PtxDevice(device.ptx.copy(tmp_path_factory.mktemp("interpreter"), []))


def register(dtype: np.dtype[Any], number: int) -> str:
    return f"%{ {2: 'h', 4: 'r', 8: 'd'}[dtype.itemsize] }{number}"


def run(device: PtxDevice, statement: str, to: np.dtype[Any], given: list[Numbers]) -> Numbers:
    """`statement` has %0 for the result and %1, ... for what is given; %p1 is a predicate that may be used."""
    lines = [FRAME]
    size = len(given[0])
    for number, dtype in enumerate([to, *(one.dtype for one in given)]):
        lines.append(f"ld.param.u64 %at{number}, [argument+{8 * number}];")
        lines.append(f"mad.lo.s64 %at{number}, %wide, {dtype.itemsize}, %at{number};")
        if number:
            lines.append(f"ld.global.b{8 * dtype.itemsize} {register(dtype, number)}, [%at{number}];")
        statement = statement.replace(f"%{number}", register(dtype, number))
    store = f"st.global.b{8 * to.itemsize} [%at0], {register(to, 0)};"
    device.ptx.load("\n".join([*lines, *(f"{one};" for one in statement.split(";")), store, "ret;", "}", ""]))
    out = np.empty(size, to)
    step = 1024
    for begin in range(0, size, step):
        buffers = [device.put(np.zeros(step, to)), *(device.put(one[begin : begin + step]) for one in given)]
        argument = np.zeros(4, np.uint64)
        argument[: len(buffers)] = [buffer.address for buffer in buffers]
        with device.ptx.expecting_faults():
            device.ptx.launch("kvs::One", argument.tobytes(), 1, step)
        out[begin : begin + step] = np.frombuffer(buffers[0].read(), to)
    return out


def draw(dtype: np.dtype[Any]) -> Numbers:
    """Corners, small numbers and any bits."""
    bits = np.dtype(f"u{dtype.itemsize}")
    found = RNG.integers(0, np.iinfo(bits).max, COUNT, bits, endpoint=True)
    if dtype.kind == "f":
        corners = np.array([0.0, -0.0, 1, -1, 0.5, 1.5, 2.5, -2.5, np.inf, -np.inf, 2.0**31, -(2.0**31), 3e-8], dtype)
        found[: COUNT // 2] = (RNG.normal(size=COUNT // 2) * 50).astype(dtype).view(bits)
        found[: len(corners)] = corners.view(bits)
        return found.view(dtype)
    found[:1024] = RNG.integers(0, 40, 1024)
    found[1024:2048] = np.iinfo(bits).max - RNG.integers(0, 40, 1024).astype(bits)
    found[:3] = [0, np.iinfo(bits).max, np.iinfo(bits).max // 2 + 1]
    return RNG.permutation(found.view(dtype))


def same(found: Numbers, expected: Numbers) -> None:
    """To the bit, but that any NaN is one."""
    if found.dtype.kind == "f":
        finite = ~np.isnan(expected)
        assert np.array_equal(np.isnan(found), ~finite)
        found, expected = found[finite], expected[finite]
    bits = np.dtype(f"u{found.dtype.itemsize}")
    wrong = np.flatnonzero(found.view(bits) != expected.astype(found.dtype).view(bits))
    assert not wrong.size, f"{wrong.size} differ: {found[wrong[:4]]} instead of {expected[wrong[:4]]}"


def wide(a: Numbers) -> Numbers:
    return a.astype(object)


def shift(a: Numbers, by: Numbers, left: bool) -> Numbers:
    bits = 8 * a.dtype.itemsize
    span = 1 << bits
    values = [
        (int(x) << min(int(n), bits)) % span if left else int(x) >> min(int(n), bits)
        for x, n in zip(a, by, strict=True)
    ]
    return np.array(
        [value - span if a.dtype.kind == "i" and value >= span // 2 else value for value in values], a.dtype
    )


TWO: dict[str, Callable[[Numbers, Numbers], Numbers]] = {
    **{f"add.{t}": lambda a, b: a + b for t in ("s16", "u32", "s32", "s64", "u64")},
    **{f"sub.{t}": lambda a, b: a - b for t in ("s16", "s32", "s64")},
    **{f"mul.lo.{t}": lambda a, b: a * b for t in ("s16", "u32", "s32", "s64", "u64")},
    **{
        f"mul.hi.{t}": lambda a, b: ((wide(a) * wide(b)) >> (8 * a.dtype.itemsize)).astype(a.dtype)
        for t in ("u16", "s16", "u32", "s32", "u64", "s64")
    },
    **{f"min.{t}": np.minimum for t in ("u16", "u32", "s32", "u64", "s64", "f32", "f64")},
    **{f"max.{t}": np.maximum for t in ("u16", "u32", "s32", "u64", "s64", "f32", "f64")},
    "min.s32.relu": lambda a, b: np.maximum(np.minimum(a, b), 0),
    **{
        f"{name}.{t}": of
        for name, of in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor))
        for t in ("b16", "b32", "b64")
    },
    **{f"add.rn.{t}": lambda a, b: a + b for t in ("f32", "f64")},
    **{f"sub.rn.{t}": lambda a, b: a - b for t in ("f32", "f64")},
    **{f"mul.rn.{t}": lambda a, b: a * b for t in ("f32", "f64")},
    **{f"div.rn.{t}": lambda a, b: a / b for t in ("f32", "f64")},
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("opcode", TWO)
def test_of_two_numbers(single: PtxDevice, opcode: str) -> None:
    dtype = TYPES[opcode.split(".")[1 if opcode.endswith("relu") else -1]]
    a, b = draw(dtype), draw(dtype)
    expected = TWO[opcode](a, b)
    if opcode.startswith(("min.f", "max.f")):  # the other one where one is none
        expected = np.where(np.isnan(a), b, np.where(np.isnan(b), a, expected)).astype(dtype)
        zeros = (a == 0) & (b == 0)
        sign = np.signbit(a) | np.signbit(b) if opcode.startswith("min") else np.signbit(a) & np.signbit(b)
        expected = np.where(zeros, np.where(sign, dtype.type(-0.0), dtype.type(0.0)), expected)
    same(run(single, f"{opcode} %0, %1, %2", dtype, [a, b]), expected)


@pytest.mark.parametrize("kind", ["div", "rem"])
@pytest.mark.parametrize("type_", ["u32", "s32", "u64"])
def test_quotients_are_cut_off(single: PtxDevice, kind: str, type_: str) -> None:
    dtype = TYPES[type_]
    a, b = draw(dtype), draw(dtype)
    b[b == 0] = 7
    quotients = [abs(int(x)) // abs(int(y)) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a, b, strict=True)]
    parts = [int(x) - int(y) * q for x, y, q in zip(a, b, quotients, strict=True)]
    expected = np.array(quotients if kind == "div" else parts, object).astype(np.int64 if dtype.kind == "i" else dtype)
    same(run(single, f"{kind}.{type_} %0, %1, %2", dtype, [a, b]), expected.astype(dtype))


def test_a_division_by_zero_is_a_fault(single: PtxDevice) -> None:
    a = np.ones(1024, np.uint32)
    with pytest.raises(PtxError, match="division by zero"):
        run(single, "div.u32 %0, %1, %2", a.dtype, [a, np.zeros_like(a)])


@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32"])
def test_wide_products(single: PtxDevice, type_: str) -> None:
    dtype = TYPES[type_]
    to = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
    a, b, c = draw(dtype), draw(dtype), draw(to)
    product = a.astype(to) * b.astype(to)
    same(run(single, f"mul.wide.{type_} %0, %1, %2", to, [a, b]), product)
    same(run(single, f"mad.wide.{type_} %0, %1, %2, %3", to, [a, b, c]), product + c)


@pytest.mark.parametrize(
    "opcode", ["shl.b16", "shl.b32", "shl.b64", "shr.u16", "shr.u32", "shr.s32", "shr.u64", "shr.s64"]
)
def test_shifts_beyond_a_number_leave_nothing_but_its_sign(single: PtxDevice, opcode: str) -> None:
    dtype = TYPES[opcode.split(".")[1]]
    a, by = draw(dtype), RNG.integers(0, 80, COUNT).astype(np.uint32)
    by[:4] = [0xFFFFFFFF, 31, 32, 64]
    same(run(single, f"{opcode} %0, %1, %2", dtype, [a, by]), shift(a, by, opcode.startswith("shl")))


def test_fused_sums_are_rounded_once(single: PtxDevice) -> None:
    a, b = (RNG.normal(size=COUNT).astype(np.float32) for _ in range(2))
    c = (-a.astype(np.float64) * b * (1 + RNG.normal(size=COUNT) * 1e-7)).astype(np.float32)
    # A product of two floats is a double, and the difference of two that are this near each other is exact.
    expected = (a.astype(np.float64) * b + c).astype(np.float32)
    same(run(single, "fma.rn.f32 %0, %1, %2, %3", TYPES["f32"], [a, b, c]), expected)


def fields(x: int, y: int, opcode: str, at: int, length: int) -> int:
    bits = int(opcode[-2:])
    ones = ((1 << length) - 1) << at & ((1 << bits) - 1)
    return (y & ~ones) | ((x << at) & ones)


@pytest.mark.parametrize("opcode", ["bfi.b32", "bfi.b64"])
@pytest.mark.parametrize(("at", "length"), [(0, 8), (5, 0), (16, 16), (24, 30), (31, 64), (40, 20), (255, 3)])
def test_fields_are_put_into_numbers(single: PtxDevice, opcode: str, at: int, length: int) -> None:
    dtype = TYPES[opcode[-3:]]
    a, b = draw(dtype), draw(dtype)
    expected = np.array([fields(int(x), int(y), opcode, at, length) for x, y in zip(a, b, strict=True)], dtype)
    same(run(single, f"{opcode} %0, %1, %2, {at}, {length}", dtype, [a, b]), expected)


@pytest.mark.parametrize("choice", [0x3210, 0x7654, 0x0, 0x4701, 0x9BF8, 0x5410])
def test_bytes_are_permuted(single: PtxDevice, choice: int) -> None:
    a, b = draw(TYPES["b32"]), draw(TYPES["b32"])
    bytes_of = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], axis=1)
    columns = []
    for place in range(4):
        nibble = choice >> 4 * place & 15
        column = bytes_of[:, nibble & 7]
        columns.append(np.where(column & 0x80, 255, 0).astype(np.uint8) if nibble & 8 else column)
    expected = np.ascontiguousarray(np.stack(columns, axis=1)).view(np.uint32).ravel()
    same(run(single, f"prmt.b32 %0, %1, %2, {choice}", TYPES["b32"], [a, b]), expected)


@pytest.mark.parametrize("table", [0xCA, 0x96, 0xE8, 0x01, 0xF0])
def test_any_function_of_three_bits(single: PtxDevice, table: int) -> None:
    a, b, c = (draw(TYPES["b32"]) for _ in range(3))
    expected = np.zeros(COUNT, np.uint32)
    for bit in range(32):
        which = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        expected |= (table >> which & 1).astype(np.uint32) << np.uint32(bit)
    same(run(single, f"lop3.b32 %0, %1, %2, %3, {table}", TYPES["b32"], [a, b, c]), expected)


@pytest.mark.parametrize("opcode", ["shf.l.wrap.b32", "shf.r.wrap.b32", "shf.l.clamp.b32", "shf.r.clamp.b32"])
def test_two_numbers_are_shifted_as_one(single: PtxDevice, opcode: str) -> None:
    low, high, by = draw(TYPES["b32"]), draw(TYPES["b32"]), RNG.integers(0, 50, COUNT).astype(np.uint32)
    n = (by & 31 if "wrap" in opcode else np.minimum(by, 32)).astype(np.uint64)
    both = high.astype(np.uint64) << np.uint64(32) | low
    expected = both >> n if ".r." in opcode else both << n >> np.uint64(32)
    if ".l." in opcode:
        expected = np.where(n == 32, low, expected)
    same(run(single, f"{opcode} %0, %1, %2, %3", TYPES["b32"], [low, high, by]), expected.astype(np.uint32))


@pytest.mark.parametrize("type_", ["b32", "b64"])
def test_bits_are_counted(single: PtxDevice, type_: str) -> None:
    a, bits = draw(TYPES[type_]), int(type_[1:])
    to = TYPES["u32"]
    counts = np.array([int(x).bit_count() for x in a], np.uint32)
    same(run(single, f"popc.{type_} %0, %1", to, [a]), counts)
    heads = np.array([bits - int(x).bit_length() for x in a], np.uint32)
    same(run(single, f"clz.{type_} %0, %1", to, [a]), heads)
    turned = np.array([int(f"{int(x):0{bits}b}"[::-1], 2) for x in a], TYPES[type_])
    same(run(single, f"brev.{type_} %0, %1", TYPES[type_], [a]), turned)


COMPARE: dict[str, Callable[[Numbers, Numbers], Numbers]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}


@pytest.mark.parametrize("how", [*COMPARE, *UNORDERED, "num", "nan"])
@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32", "u64", "s64", "f32", "f64"])
def test_comparisons(single: PtxDevice, how: str, type_: str) -> None:
    if how not in COMPARE and type_[0] != "f":
        return
    a, b = draw(TYPES[type_]), draw(TYPES[type_])
    a[::3] = b[::3]
    nan = np.isnan(a) | np.isnan(b) if type_[0] == "f" else np.zeros(COUNT, bool)
    if how in ("num", "nan"):
        expected = nan if how == "nan" else ~nan
    else:
        expected = COMPARE[UNORDERED.get(how, how)](a, b)
        expected = expected | nan if how in UNORDERED else expected & ~nan
    statement = f"setp.{how}.{type_} %p1, %1, %2;selp.u32 %0, 1, 0, %p1"
    same(run(single, statement, TYPES["u32"], [a, b]), expected.astype(np.uint32))


def test_comparisons_are_combined_with_a_predicate(single: PtxDevice) -> None:
    a, b, c = (draw(TYPES["u32"]) for _ in range(3))
    for how, of in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        found = run(
            single,
            f"setp.lt.u32 %p1, %1, %2;setp.gt.{how}.u32 %p2|%p3, %2, %3, !%p1;"
            "selp.u32 %0, 1, 0, %p2;@%p3 add.u32 %0, %0, 2",
            TYPES["u32"],
            [a, b, c],
        )
        same(found, of(b > c, ~(a < b)) * np.uint32(1) + of(~(b > c), ~(a < b)) * np.uint32(2))


def of_torch(a: Numbers, to: torch.dtype) -> Numbers:
    found: Numbers = torch.from_numpy(a.copy()).to(to).view(torch.int16).numpy().view(np.uint16)
    return found


def all_floats() -> Numbers:
    """Also those that lie in the middle between two halves, and next to it."""
    halves = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    near = [halves.view(np.float16).astype(np.float32), (halves.astype(np.uint32) << 16).view(np.float32)]
    with np.errstate(invalid="ignore"):
        middles = [(one[:-1] + one[1:]) / 2 for one in near]
        around = [np.nextafter(one, np.float32(way)) for one in middles for way in (np.inf, -np.inf)]
    found = np.concatenate([*near, *middles, *around, draw(TYPES["f32"])])
    found = found[~np.isnan(found)]
    return np.resize(found, -(-len(found) // 1024) * 1024).astype(np.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_floats_become_halves_as_elsewhere(single: PtxDevice) -> None:
    a = all_floats()
    half = a.astype(np.float16).view(np.uint16)
    same(run(single, "cvt.rn.f16.f32 %0, %1", TYPES["u16"], [a]), half)
    brain = of_torch(a, torch.bfloat16)
    same(run(single, "cvt.rn.bf16.f32 %0, %1", TYPES["u16"], [a]), brain)
    b = a[::-1].copy()
    both = half.astype(np.uint32) << 16 | half[::-1]
    same(run(single, "cvt.rn.f16x2.f32 %0, %1, %2", TYPES["u32"], [a, b]), both)
    both = brain.astype(np.uint32) << 16 | brain[::-1]
    same(run(single, "cvt.rn.bf16x2.f32 %0, %1, %2", TYPES["u32"], [a, b]), both)


def test_what_is_no_number_has_one_half(single: PtxDevice) -> None:
    a = np.full(1024, np.nan, np.float32)
    assert set(run(single, "cvt.rn.f16.f32 %0, %1", TYPES["u16"], [a])) == {0x7FFF}
    assert set(run(single, "cvt.rn.bf16.f32 %0, %1", TYPES["u16"], [a])) == {0x7FFF}


def test_halves_become_floats(single: PtxDevice) -> None:
    halves = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    same(run(single, "cvt.f32.f16 %0, %1", TYPES["f32"], [halves]), halves.view(np.float16).astype(np.float32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("to", ["u16", "s16", "u32", "s32", "u64", "s64", "f32", "f64"])
@pytest.mark.parametrize("from_", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_whole_numbers_become_others(single: PtxDevice, from_: str, to: str) -> None:
    a = draw(TYPES[from_])
    rounding = ".rn" if to[0] == "f" else ""
    same(run(single, f"cvt{rounding}.{to}.{from_} %0, %1", TYPES[to], [a]), a.astype(TYPES[to]))


@pytest.mark.parametrize(("rounding", "of"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)])
@pytest.mark.parametrize("to", ["s32", "u32", "s64"])
@pytest.mark.parametrize("from_", ["f32", "f64"])
def test_floats_become_whole_numbers_that_fit(
    single: PtxDevice, from_: str, to: str, rounding: str, of: Callable[[Numbers], Numbers]
) -> None:
    a, limits = draw(TYPES[from_]), np.iinfo(TYPES[to])
    expected = [
        0 if np.isnan(x) else max(limits.min, min(limits.max, int(of(x)) if np.isfinite(x) else int(np.sign(x)) << 70))
        for x in a
    ]
    same(run(single, f"cvt.{rounding}.{to}.{from_} %0, %1", TYPES[to], [a]), np.array(expected, TYPES[to]))


def test_modules_that_are_not_understood_are_refused(device: PtxDevice, tmp_path: Path) -> None:
    ptx: PtxLibrary = device.ptx.copy(tmp_path, [])
    for statement in (
        "add.rz.f32 %r0, %r1, %r2;",
        "ex2.approx.f32 %r0, %r1;",
        "add.s32 %r0, %r1, %d2;",
        "bra $nowhere;",
    ):
        with pytest.raises(PtxError):
            ptx.load(FRAME + statement + "\nret;\n}\n")
