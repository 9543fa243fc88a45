"""What lies in `golden/` and `golden_errors/`, and the manifests of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blake3 import blake3
from golden_objects import identity_from_json

from kvstore_s3.codec.calibration import Calibration

TESTS = Path(__file__).parent
OBJECTS: dict[str, Any] = json.loads((TESTS / "golden/manifest.json").read_text(encoding="utf-8"))
ERRORS: dict[str, Any] = json.loads((TESTS / "golden_errors/manifest.json").read_text(encoding="utf-8"))
LOSSY = [name for name, entry in OBJECTS["objects"].items() if entry["profile"] == "scalable"]
CALIBRATED = [name for name in LOSSY if OBJECTS["objects"][name]["calibrated"]]


def read_object(name: str) -> bytes:
    return (TESTS / "golden" / f"{name}.kvs3").read_bytes()


def read_error(name: str) -> bytes:
    return (TESTS / "golden_errors" / f"{name}.kvs3").read_bytes()


def read_artefact(name: str) -> bytes:
    """The calibration of a golden object."""
    return (TESTS / "golden" / "lossy" / f"{name}.safetensors").read_bytes()


def read_values(name: str, levels: int) -> bytes:
    """What the reference decoder made of the first `levels` levels of a golden object."""
    return (TESTS / "golden" / "lossy" / f"{name}.{levels}.values").read_bytes()


def load_calibrations(name: str | None) -> dict[bytes, Calibration]:
    """The calibration of a golden object by its digest, as the package reads it; none for None."""
    if name is None:
        return {}
    data, identity = read_artefact(name), identity_from_json(OBJECTS["objects"][name]["identity"])
    return {blake3(data).digest(): Calibration.from_bytes(data, identity.layout, identity.namespace)}
