"""Write the golden objects, golden errors and their manifests anew: `python tests/golden/regenerate.py --overwrite`.

Golden files are promises to everyone who has stored something. Regenerate them only with a new format version, or to
add to them; the tests refuse bytes that changed without it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

# ruff: noqa: E402
import zstandard
from blake3 import blake3
from golden_faults import make_all_errors
from golden_objects import Golden, as_bytes, identity_to_json, make_all
from golden_scalable import decode_levels, digest_integers, make_all_scalable
from golden_scalable_faults import make_all_scalable_errors
from object_decoder import to_reference

from kvstore_s3.bitstream import PROFILES, encode_hint, parse_header

OBJECTS = TESTS / "golden"
ERRORS = TESTS / "golden_errors"


def describe(golden: Golden) -> dict[str, Any]:
    """The manifest's entry of a golden object."""
    header = parse_header(golden.data, golden.identity, profiles=frozenset(PROFILES), calibrations=None)
    entry = {
        "identity": identity_to_json(golden.identity),
        "profile": golden.profile,
        "codecs": list(golden.codecs),
        "bytes": len(golden.data),
        "blake3": blake3(golden.data).hexdigest(),
        "values_blake3": None if golden.values is None else blake3(as_bytes(golden.values)).hexdigest(),
        "hint": encode_hint(header.table),
    }
    return entry | describe_levels(golden) if golden.profile == "scalable" else entry


def describe_levels(golden: Golden) -> dict[str, Any]:
    """What the manifest says of a lossy object beside that. Its values are in files: they need not agree exactly."""
    expected = to_reference(golden.identity, golden.first_position)
    for level in range(1, golden.levels + 1):
        values = as_bytes(decode_levels(golden.data, expected, golden.artefact, level))
        (OBJECTS / "lossy" / f"{golden.name}.{level}.values").write_bytes(values)
    if golden.artefact is not None:
        (OBJECTS / "lossy" / f"{golden.name}.safetensors").write_bytes(golden.artefact)
    return {
        "first_position": golden.first_position,
        "calibrated": golden.artefact is not None,
        "integers_blake3": [
            digest_integers(golden.data, expected, golden.artefact, level) for level in range(1, golden.levels + 1)
        ],
    }


def write_all() -> None:
    for folder in (OBJECTS, ERRORS):
        for old in folder.glob("*.kvs3"):
            old.unlink()
    (OBJECTS / "lossy").mkdir(exist_ok=True)
    for old in (OBJECTS / "lossy").iterdir():
        old.unlink()
    objects, errors = make_all() + make_all_scalable(), make_all_errors() + make_all_scalable_errors()
    for golden in objects:
        (OBJECTS / f"{golden.name}.kvs3").write_bytes(golden.data)
    for error in errors:
        (ERRORS / f"{error.name}.kvs3").write_bytes(error.data)
    zstd = ".".join(map(str, zstandard.ZSTD_VERSION))
    _write_json(
        OBJECTS / "manifest.json", {"zstd": zstd, "objects": {golden.name: describe(golden) for golden in objects}}
    )
    _write_json(
        ERRORS / "manifest.json",
        {
            error.name: {
                "code": int(error.code),
                "fault": error.code.name,
                "identity": identity_to_json(error.identity),
                "profile": error.profile,
                "calibration": error.calibration,
                "first_position": error.first_position,
            }
            for error in errors
        },
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--overwrite"]:
        sys.exit(f"{__doc__}\nNothing was written: say --overwrite.")
    write_all()
