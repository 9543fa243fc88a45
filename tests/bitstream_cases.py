"""What the bitstream tests share: golden objects, an identity of their own, and a call's fault as a number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reference_decoder as reference
from crafted import CraftedSection
from golden_objects import as_bytes, identity_from_json, make_identity, make_values
from hypothesis import strategies as st

from kvstore_s3.bitstream import PROFILES, Identity
from kvstore_s3.errors import DamagedObjectError
from kvstore_s3.layout import Shard

GOLDEN = Path(__file__).parent / "golden"
MANIFEST: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))["objects"]
DECODABLE = [name for name, entry in MANIFEST.items() if entry["values_blake3"]]
SMALL = [name for name in DECODABLE if MANIFEST[name]["bytes"] <= 512]

ALL = frozenset(PROFILES)
ALL_IDS = frozenset(PROFILES.values())
IDENTITY = make_identity("bitstream", Shard(1, 4, 0, 2), dtype="float16", tokens=4, head_dim=4)


def read_golden(name: str) -> tuple[bytes, Identity]:
    return (GOLDEN / f"{name}.kvs3").read_bytes(), identity_from_json(MANIFEST[name]["identity"])


def fault_of(decode: Callable[..., object], *args: Any, **kwargs: Any) -> int:
    """The number that a call is refused with, 0 where it is not; any other exception is a failure of the test."""
    try:
        decode(*args, **kwargs)
    except (DamagedObjectError, reference.Fault) as refused:
        return int(refused.code)
    return 0


def raw_sections(identity: Identity, seed: str = "bitstream") -> list[CraftedSection]:
    """One raw section for each layer."""
    values, first = make_values(identity, seed), identity.shard.layer_begin
    return [
        CraftedSection(layers=(layer, layer + 1), data=as_bytes(values[layer - first : layer - first + 1]))
        for layer in range(first, identity.shard.layer_end)
    ]


@st.composite
def divisions(draw: st.DrawFn, shard: Shard) -> list[tuple[int, int, int]]:
    """Parts, first and last layer of each section of one level."""
    division, begin = [], shard.layer_begin
    while begin < shard.layer_end:
        end = draw(st.integers(begin + 1, shard.layer_end))
        division += [(parts, begin, end) for parts in draw(st.sampled_from([(3,), (1, 2)]))]
        begin = end
    return division
