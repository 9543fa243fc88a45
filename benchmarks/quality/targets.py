"""What the tables have to show: each row with its limit, what was found, and whether it is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quality.curves import bits_at, ratios
from quality.measure import Point

NEAR_BITS = {"stories260K": 3.5, "books8M": 1.7}
"""Most bits of near-lossless on the models that the limits were set on; on others the larger one counts."""
KVTC = ("KVTC-like", "KVTC-like, K and V jointly")

Curves = Mapping[str, Sequence[Point]]


@dataclass(frozen=True, slots=True)
class Row:
    """One target: `found` and `limit` in the same unit; `met` None where it could not be measured."""

    name: str
    found: float | None
    limit: float
    detail: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.found is None else self.found <= self.limit

    def as_json(self) -> dict[str, Any]:
        return {"target": self.name, "found": self.found, "limit": self.limit, "met": self.met, "detail": self.detail}


def check_targets(model: str, curves: Curves, default: str, widest: str, embedding: Mapping[str, float]) -> list[Row]:
    """`default` and `widest` are the names of our curves of the default span and of all heads and layers."""
    ours, whole = curves[default], curves[widest]
    return [
        *_near_lossless(model, ours, curves["fp8 e4m3"][0]),
        _at_points("bits / CacheGen (LMCache) at its KL", ours, curves["CacheGen (LMCache)"], 0.25),
        *(
            _between(f"default span: bits / {peer} at equal KL", ours, curves[peer], 1.35)
            for peer in KVTC
            if peer in curves
        ),
        *(
            _between(f"span all: bits / {peer} at equal KL", whole, curves[peer], 0.9)
            for peer in KVTC
            if peer in curves
        ),
        *(
            Row(f"embedding: {quality} / coded alone", cost, 1.01, "ideal code lengths, tables of the same chunks")
            for quality, cost in embedding.items()
        ),
        Row("lossless: bits without calibration", curves["ours, lossless"][0].bits, 10.5),
    ]


def _near_lossless(model: str, ours: Sequence[Point], fp8: Point) -> list[Row]:
    near = ours[-1]
    limit = NEAR_BITS.get(model, max(NEAR_BITS.values()))
    at_fp8 = bits_at(ours, fp8.kl)
    return [
        Row("near-lossless: KL x 1000", near.kl, fp8.kl, "limit: fp8's"),
        Row("near-lossless: bits", near.bits, limit, "" if at_fp8 is None else f"{at_fp8:.3f} bits at fp8's own KL"),
    ]


def _at_points(name: str, ours: Sequence[Point], peer: Sequence[Point], limit: float) -> Row:
    """At the KL of each of the peer's own settings; the worst of them."""
    found = [(bits / point.bits, point) for point in peer if (bits := bits_at(ours, point.kl)) is not None]
    if not found:
        return Row(name, None, limit, "the curves do not overlap")
    worst = max(found, key=lambda entry: entry[0])
    return Row(name, worst[0], limit, f"worst of {len(found)}, at {worst[1].setting}, KL {worst[1].kl:.3g}")


def _between(name: str, ours: Sequence[Point], peer: Sequence[Point], limit: float) -> Row:
    """At the KL of each of our qualities that the peer's curve reaches; the worst of them."""
    kept = [(kl, ratio) for kl, ratio in ratios(ours, peer) if any(point.kl == kl for point in ours)]
    if not kept:
        return Row(name, None, limit, "the curves do not overlap")
    kl, worst = max(kept, key=lambda entry: entry[1])
    text = ", ".join(f"{ratio:.2f} at KL {at:.3g}" for at, ratio in kept)
    return Row(name, worst, limit, f"worst at KL {kl:.3g}; {text}")
