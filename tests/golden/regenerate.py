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

from kvstore_s3.bitstream import PROFILES, encode_hint, parse_header

OBJECTS = TESTS / "golden"
ERRORS = TESTS / "golden_errors"


def describe(golden: Golden) -> dict[str, Any]:
    """The manifest's entry of a golden object."""
    table = parse_header(golden.data, golden.identity, profiles=frozenset(PROFILES)).table
    return {
        "identity": identity_to_json(golden.identity),
        "profile": golden.profile,
        "codecs": list(golden.codecs),
        "bytes": len(golden.data),
        "blake3": blake3(golden.data).hexdigest(),
        "values_blake3": None if golden.values is None else blake3(as_bytes(golden.values)).hexdigest(),
        "hint": encode_hint(table),
    }


def write_all() -> None:
    for folder in (OBJECTS, ERRORS):
        for old in folder.glob("*.kvs3"):
            old.unlink()
    objects, errors = make_all(), make_all_errors()
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
