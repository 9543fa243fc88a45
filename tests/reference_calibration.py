"""Tables and the calibration artefact, read as docs/format-scalable.md says. Imports nothing of `kvstore_s3`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

DOCUMENT = Path(__file__).parent.parent / "docs" / "format-scalable-tables.md"
CLASSES = 48
SPANS = ("channel", "head", "group", "all")
CHANNEL, HEAD, GROUP, ALL = range(4)
STYLES = ("none", "halves", "pairs")
MAPS = ("synthesis", "analysis")
DTYPES = {"U8": np.uint8, "U16": np.uint16, "F16": np.float16, "F32": np.float32}


class RefusedError(Exception):
    """The document says that this MUST be refused."""


def require(holds: bool, message: str) -> None:
    if not holds:
        raise RefusedError(message)


# Tables


@dataclass(frozen=True)
class Tables:
    """`base` by class, `refine` by level - 1, class and context, `shift` by level and class."""

    first: list[int]
    base: list[list[int]]
    refine: list[list[list[tuple[int, int]]]]
    shift: list[list[float]]

    def check(self) -> Tables:
        require(self.first == sorted(self.first, reverse=True) and self.first[2] >= 1, "first ascends or holds a 0")
        require(self.first[0] <= CLASSES, "first beyond the classes")
        for number, row in enumerate(self.base):
            if number < self.first[0]:
                require(not any(row), "base of a class that is not coded")
            else:
                require(sum(row) == 4096 and max(row) <= 4095 and row[255] >= 1, "frequencies of a class")
        for level in (1, 2):
            for number, contexts in enumerate(self.refine[level - 1]):
                for low, high in contexts:
                    coded = number >= self.first[level]
                    require(0 < low < high < 4096 if coded else low == high == 0, "refine")
        require(all(0 <= shift <= 0.5 for row in self.shift for shift in row), "shift")
        return self

    @cached_property
    def symbols(self) -> list[list[int]]:
        """By class: the symbol of each slot."""
        return [[symbol for symbol in range(256) for _ in range(row[symbol])] for row in self.base]

    @cached_property
    def starts(self) -> list[list[int]]:
        """By class: the first slot of each symbol."""
        return [[sum(row[:symbol]) for symbol in range(256)] if any(row) else [] for row in self.base]


def read_block(text: str, name: str) -> list[list[int]]:
    """The numbers of each line of a block; `3x17` is 17 three times."""
    block = re.search(rf"```{name}\n(.*?)```", text, re.DOTALL)
    assert block is not None
    lines = []
    for line in block[1].splitlines():
        pairs = [word.split("x") if "x" in word else ["1", word] for word in line.split()]
        lines.append([int(value) for count, value in pairs for _ in range(int(count))])
    return lines


@cache
def uncalibrated_tables() -> Tables:
    """Those of the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    (first,) = read_block(text, "first")
    base = [[0] * 256 for _ in range(CLASSES)]
    for number, escape, *half in read_block(text, "base"):
        half += [0] * (128 - len(half))
        base[number] = half[:0:-1] + half + [escape]
    refine = [[[(0, 0)] * 4 for _ in range(CLASSES)] for _ in range(2)]
    for level, number, *cuts in read_block(text, "refine"):
        refine[level - 1][number] = list(zip(cuts[::2], cuts[1::2], strict=True))
    shift = [[0.0] * CLASSES for _ in range(3)]
    for level, *shifts in read_block(text, "shift"):
        shift[level][first[level] :] = [number / 4096 for number in shifts]
    return Tables(first, base, refine, shift).check()


# The artefact


@dataclass(frozen=True)
class Unit:
    """What one stream is calibrated with. `synthesis` is None for span channel."""

    classes: list[int]
    synthesis: np.ndarray | None
    scale: np.ndarray


@dataclass(frozen=True)
class Calibration:
    namespace: str
    span: int
    layer_group: int
    layers: int
    kv_heads: int
    dim: int
    rotary: int
    frequencies: np.ndarray
    rotated: list[int]
    mean: np.ndarray
    tables: Tables
    units: dict[tuple[int, int], Unit]

    def layers_of(self, group: int) -> int:
        return min(self.layer_group, self.layers - group * self.layer_group)


def read_safetensors(data: bytes) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """8 bytes length of the header, a JSON header, then the tensors where its `data_offsets` say."""
    size = int.from_bytes(data[:8], "little")
    require(len(data) >= 8 and size <= len(data) - 8, "no room for the header of the file")
    try:
        header: dict[str, Any] = json.loads(data[8 : 8 + size])
    except ValueError as error:
        raise RefusedError("the header of the file is not JSON") from error
    metadata, tensors = header.pop("__metadata__", {}), {}
    body = data[8 + size :]
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            continue  # of a later version: what is asked for below is missing then
        dtype, (begin, end) = np.dtype(DTYPES[entry["dtype"]]).newbyteorder("<"), entry["data_offsets"]
        count = int(np.prod(entry["shape"], dtype=object))
        require(0 <= begin <= end <= len(body) and end - begin == count * dtype.itemsize, f"place of {name}")
        tensors[name] = np.frombuffer(body[begin:end], dtype).reshape(entry["shape"])
    return metadata, tensors


class Tensors:
    """The tensors of a file, each checked as it is taken."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors

    def size(self, name: str) -> int:
        require(name in self.tensors, f"no tensor {name}")
        return self.tensors[name].size

    def take(self, name: str, dtypes: str, *shape: int) -> np.ndarray:
        require(name in self.tensors, f"no tensor {name}")
        tensor = self.tensors[name]
        require(tensor.dtype in [np.dtype(DTYPES[dtype]) for dtype in dtypes.split()], f"dtype of {name}")
        require(tensor.shape == shape, f"shape of {name}")
        require(bool(np.isfinite(tensor.astype(np.float64)).all()), f"{name} is not finite")
        return tensor


def read_number(metadata: dict[str, str], name: str) -> int:
    require(re.fullmatch("[1-9][0-9]{0,3}", metadata.get(name, "")) is not None, f"metadata {name}")
    return int(metadata[name])


def read_calibration(data: bytes) -> Calibration:
    metadata, found = read_safetensors(data)
    tensors = Tensors(found)
    require(metadata.get("format") == "kvstore-s3 calibration 1", "format")
    require(metadata.get("span") in SPANS and metadata.get("rotary") in STYLES, "span or rotary")
    names = ("layer_group", "layers", "kv_heads", "head_dim")
    group, layers, heads, dim = (read_number(metadata, name) for name in names)
    require(group <= layers, "layer_group")
    rotary = STYLES.index(metadata["rotary"])
    rotated = tensors.take("rotated", "U8", layers).tolist()
    require(set(rotated) <= {0, 1}, "rotated layers")
    calibration = Calibration(
        namespace=metadata.get("namespace", ""),
        span=SPANS.index(metadata["span"]),
        layer_group=group,
        layers=layers,
        kv_heads=heads,
        dim=dim,
        rotary=rotary,
        frequencies=read_frequencies(tensors, dim) if rotary else np.zeros(0, np.float32),
        rotated=rotated,
        mean=tensors.take("mean", "F32", layers, 2, heads, dim),
        tables=read_tables(tensors),
        units={},
    )
    for g in range(-(-layers // group)):
        for u in range(1 if calibration.span == ALL else heads):
            calibration.units[g, u] = read_unit(tensors, calibration, g, u)
    return calibration


def read_frequencies(tensors: Tensors, dim: int) -> np.ndarray:
    pairs = tensors.size("inverse_frequencies")
    require(1 <= pairs <= dim // 2, "number of pairs")
    return tensors.take("inverse_frequencies", "F32", pairs)


def read_tables(tensors: Tensors) -> Tables:
    first = tensors.take("first", "U8", 3).tolist()
    base = tensors.take("base", "U16", CLASSES, 256).tolist()
    cuts = tensors.take("refine", "U16", 2, CLASSES, 4, 2).tolist()
    refine = [[[(low, high) for low, high in contexts] for contexts in level] for level in cuts]
    return Tables(first, base, refine, tensors.take("shift", "F32", 3, CLASSES).tolist()).check()


def read_unit(tensors: Tensors, calibration: Calibration, g: int, u: int) -> Unit:
    blocks, dim, span = 2 * calibration.layers_of(g), calibration.dim, calibration.span
    n = blocks * dim * (calibration.kv_heads if span == ALL else 1)
    count = tensors.size(f"classes.{g}.{u}")
    require(1 <= count <= n if span in (GROUP, ALL) else count == n, "number of components")
    classes = tensors.take(f"classes.{g}.{u}", "U8", count).tolist()
    require(max(classes) < CLASSES, "class")
    shape = (blocks, dim, dim) if span == HEAD else (count, n)
    matrices = {name: tensors.take(f"{name}.{g}.{u}", "F16 F32", *shape) for name in MAPS if span != CHANNEL}
    scales = {name: tensors.take(f"{name}_scale.{g}.{u}", "F32", count) for name in MAPS}
    return Unit(classes, matrices.get("synthesis"), scales["synthesis"])
