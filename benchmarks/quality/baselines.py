"""Peers without a model of their data: fp8, KIVI-like integers, zstd. Each written from its paper or specification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import zstandard

from quality.measure import Coded

GROUP = 32
"""KIVI's group size."""


@dataclass(frozen=True, slots=True)
class Fp8:
    """FP8 E4M3 with a scale of 1 for every tensor, as inference engines keep an fp8 KV cache without calibration.

    P. Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433; saturating, as there.
    """

    curve: str = "fp8 e4m3"
    setting: str = "scale 1"
    timed: bool = True

    def encode(self, chunk: torch.Tensor, first_position: int) -> Coded:
        largest = torch.finfo(torch.float8_e4m3fn).max
        data = chunk.clamp(-largest, largest).to(torch.float8_e4m3fn)
        return Coded({"values": 8 * data.numel()}, data)

    def decode(self, coded: Coded, first_position: int) -> torch.Tensor:
        values: torch.Tensor = coded.data.to(torch.bfloat16)
        return values


@dataclass(frozen=True, slots=True)
class Kivi:
    """Integers of `width` bits between each group's minimum and maximum: K by channel, V by token.

    Z. Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv:2402.02750: groups of 32
    tokens of one channel of K, of 32 neighbouring channels of one token of V; scale and zero point are float16. KIVI's
    window of recent tokens in full precision is an engine's matter and not stored. Plain torch, integers not packed.
    """

    width: int
    curve: str = "KIVI-like"
    timed: bool = True

    @property
    def setting(self) -> str:
        return f"int{self.width}, groups of {GROUP}"

    def encode(self, chunk: torch.Tensor, first_position: int) -> Coded:
        keys, values = chunk.float().unbind(1)
        grouped = [split_groups(keys.flatten(2).transpose(1, 2)), split_groups(values.flatten(2))]
        coded = [self._quantise(part) for part in grouped]
        count = sum(part.numel() for part, _, _ in coded)
        groups = sum(scale.numel() for _, scale, _ in coded)
        return Coded({"values": self.width * count, "scales and zero points": 32 * groups}, (coded, chunk.shape))

    def decode(self, coded: Coded, first_position: int) -> torch.Tensor:
        parts, (layers, _, tokens, heads, dim) = coded.data
        keys, values = (part.float() * scale.float() + low.float() for part, scale, low in parts)
        keys = keys.reshape(layers, heads * dim, -1)[..., :tokens].transpose(1, 2)
        values = values.reshape(layers, tokens, -1)[..., : heads * dim]
        return torch.stack([keys, values], 1).reshape(layers, 2, tokens, heads, dim).bfloat16()

    def _quantise(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        most = 2**self.width - 1
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        low = low.half()
        scale = ((high - low.float()) / most).half().clamp_min(torch.finfo(torch.float16).tiny)
        whole = ((groups - low.float()) / scale.float()).round().clamp(0, most)
        return whole.to(torch.uint8), scale, low


def split_groups(rows: torch.Tensor) -> torch.Tensor:
    """The last axis in groups of GROUP, the last one filled up with its last value: [..., groups, GROUP]."""
    lacking = -rows.shape[-1] % GROUP
    if lacking:
        rows = torch.cat([rows, rows[..., -1:].expand(*rows.shape[:-1], lacking)], -1)
    return rows.unflatten(-1, (-1, GROUP))


@dataclass(frozen=True, slots=True)
class Zstd:
    """Zstandard (RFC 8878) on the bfloat16 as they lie, at the level that object stores' clients mostly use."""

    level: int = 3
    curve: str = "zstd on bf16"
    timed: bool = True

    @property
    def setting(self) -> str:
        return f"level {self.level}"

    def encode(self, chunk: torch.Tensor, first_position: int) -> Coded:
        raw = chunk.contiguous().view(torch.uint16).numpy().tobytes()
        frame = zstandard.ZstdCompressor(level=self.level).compress(raw)
        return Coded({"frame": 8 * len(frame)}, (frame, chunk.shape))

    def decode(self, coded: Coded, first_position: int) -> torch.Tensor:
        frame, shape = coded.data
        raw = bytearray(zstandard.ZstdDecompressor().decompress(frame))
        return torch.frombuffer(raw, dtype=torch.bfloat16).reshape(shape)
