"""The calibration artefact: what was learned once per namespace, and what its objects cannot be decoded without.

`docs/format-scalable.md` is the authority. How it is learned is in `learning.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from safetensors import SafetensorError, deserialize

from kvstore_s3.codec.rotation import STYLES, Floats, Rotation
from kvstore_s3.codec.tables import TableSet
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.layout import KVLayout

FORMAT = "kvstore-s3 calibration 1"
SPANS = ("channel", "head", "group", "all")
"""How far the transform reaches, by id in the bitstream."""

Array = npt.NDArray[Any]

_KINDS = {"U8": "u1", "U16": "u2", "F16": "f2", "F32": "f4"}
"""The dtypes of safetensors that are used here, as numpy calls them."""


@dataclass(frozen=True, eq=False)
class Unit:
    """The affine map of one stream. Shapes, by span (n numbers of a token, n' components, B = 2 x layers blocks):

    `classes` uint8 [n']; `synthesis` float16 or float32 [n', n], head [B, dim, dim], channel None; `analysis` of the
    same shape; their scales float32 [n'], one factor for each component's row.
    """

    classes: npt.NDArray[np.uint8]
    synthesis: Array | None
    synthesis_scale: Floats
    analysis: Array | None
    analysis_scale: Floats

    @classmethod
    def pack(cls, classes: npt.NDArray[np.uint8], synthesis: Floats, analysis: Floats) -> Unit:
        """From float matrices of the shapes above: rows as float16 of magnitude 1 at most, and their factors."""
        return cls(classes, *_pack_rows(synthesis), *_pack_rows(analysis))

    @cached_property
    def decode_matrix(self) -> torch.Tensor:
        """S as float32, scaled."""
        return _scaled(self.synthesis, self.synthesis_scale)

    @cached_property
    def encode_matrix(self) -> torch.Tensor:
        """A as float32, scaled."""
        return _scaled(self.analysis, self.analysis_scale)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Everything that one namespace's scalable objects are coded with.

    `mean` is float32 [layers, 2, kv_heads, head_dim], K with its rotation undone. `units` go by (layer group, head),
    the head 0 for span "all". `report` says what was measured; decoding does not need it.
    """

    namespace: bytes
    layers: int
    kv_heads: int
    head_dim: int
    span: str
    layer_group: int
    rotation: Rotation
    mean: Floats
    tables: TableSet
    units: Mapping[tuple[int, int], Unit]
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        return -(-self.layers // self.layer_group)

    def group_layers(self, group: int) -> tuple[int, int]:
        """First layer of a group and the one behind its last."""
        begin = group * self.layer_group
        return begin, min(begin + self.layer_group, self.layers)

    def unit_mean(self, group: int, head: int) -> Floats:
        """The mean of one stream's numbers, float32 [n]."""
        begin, end = self.group_layers(group)
        part = self.mean[begin:end]
        if self.span == "all":
            return np.ascontiguousarray(part.transpose(2, 0, 1, 3)).reshape(-1)
        return np.ascontiguousarray(part[:, :, head]).reshape(-1)

    def to_bytes(self) -> bytes:
        """The artefact: a safetensors file, the same bytes for the same calibration."""
        tensors: dict[str, Array] = {
            "rotated": self.rotation.rotated,
            "mean": self.mean,
            "first": np.array(self.tables.first, np.uint8),
            "base": self.tables.base,
            "refine": self.tables.refine,
            "shift": self.tables.shift,
        }
        if self.rotation.style != "none":
            tensors["inverse_frequencies"] = self.rotation.inverse_frequencies
        for (group, head), unit in self.units.items():
            for name in ("classes", "synthesis", "synthesis_scale", "analysis", "analysis_scale"):
                tensor = getattr(unit, name)
                if tensor is not None:
                    tensors[f"{name}.{group}.{head}"] = tensor
        return _write_safetensors(tensors, self._metadata())

    def _metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "namespace": self.namespace.hex(),
            "span": self.span,
            "layer_group": str(self.layer_group),
            "layers": str(self.layers),
            "kv_heads": str(self.kv_heads),
            "head_dim": str(self.head_dim),
            "rotary": self.rotation.style,
            "report": json.dumps(self.report, sort_keys=True),
        }

    @classmethod
    def from_bytes(cls, data: bytes, layout: KVLayout, namespace: bytes) -> Calibration:
        """Read and check an artefact against the layout and the namespace digest of its reader.

        Raises `InvalidArgumentError` naming what is wrong: nothing of the file is believed.
        """
        metadata = _read_metadata(data)
        stated = {"format": FORMAT, "namespace": namespace.hex(), "layers": str(layout.layers)}
        stated |= {"kv_heads": str(layout.kv_heads), "head_dim": str(layout.head_dim)}
        for name, expected in stated.items():
            if metadata.get(name) != expected:
                raise _refusal(f"its {name} is {metadata.get(name)!r}, expected {expected!r}")
        if metadata.get("span") not in SPANS or metadata.get("rotary") not in STYLES:
            raise _refusal(f"span {metadata.get('span')!r} or rotary {metadata.get('rotary')!r} is unknown")
        group = _parse_group(metadata.get("layer_group"), layout.layers)
        try:
            tensors = _Tensors(dict(deserialize(data)))  # type: ignore[no-untyped-call]
        except SafetensorError as error:
            raise _refusal(f"it is not a safetensors file that can be read: {error}") from error
        found = cls(
            namespace=namespace,
            layers=layout.layers,
            kv_heads=layout.kv_heads,
            head_dim=layout.head_dim,
            span=metadata["span"],
            layer_group=group,
            rotation=_read_rotation(tensors, metadata["rotary"], layout),
            mean=tensors.take("mean", "f4", (layout.layers, 2, layout.kv_heads, layout.head_dim)),
            tables=_read_tables(tensors),
            units={},
            report=_parse_report(metadata.get("report", "{}")),
        )
        units = {
            (index, head): _read_unit(tensors, found, index, head)
            for index in range(found.groups)
            for head in range(1 if found.span == "all" else layout.kv_heads)
        }
        return cls(**{**_fields(found), "units": units})


def calibration_digest(data: bytes) -> bytes:
    """What objects call an artefact by: BLAKE3 of its bytes, 32 bytes."""
    return blake3(data).digest()


class _Tensors:
    """The tensors of a file, each checked as it is taken: others may be of any kind."""

    def __init__(self, tensors: Mapping[str, Mapping[str, Any]]) -> None:
        self._tensors = tensors

    def take(self, name: str, kinds: str, shape: tuple[int, ...] | None = None) -> Array:
        """The tensor `name`, of one of the dtypes `kinds` (such as "f2 f4") and of `shape`; floats are finite."""
        found = self._tensors.get(name)
        if found is None:
            raise _refusal(f"tensor {name!r} is missing")
        kind, sizes = _KINDS.get(found["dtype"]), tuple(found["shape"])
        if kind not in kinds.split() or (shape is not None and sizes != shape):
            raise _refusal(f"tensor {name!r} is {found['dtype']} {list(sizes)}, expected {kinds} {shape or ''}")
        tensor: Array = np.frombuffer(found["data"], f"<{kind}").reshape(sizes)
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise _refusal(f"tensor {name!r} holds values that are not finite")
        return tensor


def _read_rotation(tensors: _Tensors, style: str, layout: KVLayout) -> Rotation:
    rotated = tensors.take("rotated", "u1", (layout.layers,))
    if (rotated > 1).any():
        raise _refusal(f"rotated holds {rotated.max()}, expected 0 or 1")
    if style == "none":
        return Rotation(style, np.empty(0, np.float32), rotated)
    frequencies = tensors.take("inverse_frequencies", "f4")
    if frequencies.ndim != 1 or not 1 <= len(frequencies) <= layout.head_dim // 2:
        raise _refusal(f"{frequencies.size} inverse frequencies for a head of {layout.head_dim}")
    return Rotation(style, frequencies, rotated)


def _read_tables(tensors: _Tensors) -> TableSet:
    first = tensors.take("first", "u1", (3,))
    tables = TableSet(
        first=(int(first[0]), int(first[1]), int(first[2])),
        base=tensors.take("base", "u2", (48, 256)),
        refine=tensors.take("refine", "u2", (2, 48, 4, 2)),
        shift=tensors.take("shift", "f4", (3, 48)),
    )
    tables.check()
    return tables


def _read_unit(tensors: _Tensors, of: Calibration, group: int, head: int) -> Unit:
    begin, end = of.group_layers(group)
    blocks = 2 * (end - begin)
    n = blocks * of.head_dim * (of.kv_heads if of.span == "all" else 1)
    place = f".{group}.{head}"
    classes = tensors.take(f"classes{place}", "u1")
    count = len(classes) if classes.ndim == 1 else 0
    if not 1 <= count <= n or (of.span in ("channel", "head") and count != n) or classes.max() > 47:
        raise _refusal(f"classes{place} has shape {list(classes.shape)} and values up to {classes.max(initial=0)}")
    scales = [tensors.take(f"{name}_scale{place}", "f4", (count,)) for name in ("synthesis", "analysis")]
    if of.span == "channel":
        return Unit(classes, None, scales[0], None, scales[1])
    shape = (blocks, of.head_dim, of.head_dim) if of.span == "head" else (count, n)
    matrices = [tensors.take(f"{name}{place}", "f2 f4", shape) for name in ("synthesis", "analysis")]
    return Unit(classes, matrices[0], scales[0], matrices[1], scales[1])


def _pack_rows(matrix: Floats) -> tuple[Array, Floats]:
    largest = np.abs(matrix).max(axis=-1, keepdims=True)
    scale = np.where(largest > 0, largest, 1).astype(np.float32)
    return (matrix / scale).astype(np.float16), np.ascontiguousarray(scale.reshape(-1))


def _scaled(matrix: Array | None, scale: Floats) -> torch.Tensor:
    if matrix is None:
        return torch.from_numpy(scale)
    rows = torch.from_numpy(matrix).to(torch.float32)
    return rows * torch.from_numpy(scale).view(*rows.shape[:-1], 1)


def _write_safetensors(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """By hand, because the library writes metadata in the order of a hash map: other bytes every time."""
    names = {kind: name for name, kind in _KINDS.items()}
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    data, end = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        tensor = np.ascontiguousarray(tensors[name], dtype=tensors[name].dtype.newbyteorder("<"))
        start, end = end, end + tensor.nbytes
        kind = names[tensor.dtype.str[1:]]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
        data.append(tensor.tobytes())
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data)


def _read_metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise _refusal("it is cut off")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise _refusal(f"its header is not JSON: {error}") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refusal("it has no metadata")
    return metadata


def _parse_group(text: str | None, layers: int) -> int:
    if text is None or not re.fullmatch("[1-9][0-9]{0,3}", text, re.ASCII) or int(text) > layers:
        raise _refusal(f"layer_group is {text!r}, expected 1 to {layers}")
    return int(text)


def _parse_report(text: str) -> dict[str, Any]:
    try:
        report = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}


def _fields(calibration: Calibration) -> dict[str, Any]:
    return {name: getattr(calibration, name) for name in Calibration.__dataclass_fields__}


def _refusal(found: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"this calibration cannot be used: {found}; run kvstore-s3 calibrate again")
