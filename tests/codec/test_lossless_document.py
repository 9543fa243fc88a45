"""The document, the header, the generator and the golden payloads say the same."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import reference_lossless

from kvstore_s3 import _native
from kvstore_s3.codec.lossless import LosslessCodec
from kvstore_s3.codec.registry import codec_for

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden" / "codec"
INDEX = json.loads((GOLDEN / "index.json").read_text())
WIDTHS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32, "float8_e4m3fn": np.uint8}


def golden_values(name: str) -> np.ndarray:
    entry = INDEX[name]
    data = (GOLDEN / f"{name}.values").read_bytes()
    return np.frombuffer(data, WIDTHS[entry["dtype"]]).reshape(entry["shape"])


def lossless_names() -> list[str]:
    return [name for name, entry in INDEX.items() if entry["codec"] == 1]


def test_the_document_and_the_header_have_the_same_tables() -> None:
    header = (ROOT / "csrc" / "lossless_tables.h").read_text()
    rows = re.search(r"kFrequencies\[16\]\[64\] = \{(.*?)\};", header, re.DOTALL)
    assert rows is not None
    numbers = [int(number) for number in re.findall(r"\d+", rows[1])]
    assert numbers == [number for table in reference_lossless.TABLES for number in table]


def test_the_generator_still_writes_the_header() -> None:
    generator = runpy.run_path(str(ROOT / "csrc" / "generate_lossless_tables.py"))
    assert generator["header"]() + "\n" == (ROOT / "csrc" / "lossless_tables.h").read_text()


@pytest.mark.parametrize("name", INDEX)
def test_every_golden_payload_decodes_to_its_values(name: str) -> None:
    values = golden_values(name)
    out = np.empty_like(values)
    payload = (GOLDEN / f"{name}.payload").read_bytes()
    codec = codec_for(INDEX[name]["codec"], INDEX[name]["dtype"])
    codec.decode(memoryview(payload), out, head_begin=0, section_heads=values.shape[3])
    np.testing.assert_array_equal(out, values)


@pytest.mark.parametrize("implementation", _native.implementations())
@pytest.mark.parametrize("name", lossless_names())
def test_every_implementation_writes_the_golden_payloads(name: str, implementation: str) -> None:
    payload = LosslessCodec(implementation).encode(golden_values(name))
    assert payload == (GOLDEN / f"{name}.payload").read_bytes()


@pytest.mark.parametrize("name", lossless_names())
def test_the_reference_decoder_reads_the_golden_payloads(name: str) -> None:
    values = golden_values(name)
    payload = (GOLDEN / f"{name}.payload").read_bytes()
    decoded = reference_lossless.decode(payload, reference_lossless.Shape(*values.shape))
    assert decoded == {place: int(value) for place, value in np.ndenumerate(values)}


def test_the_worked_example_is_the_golden_payload() -> None:
    text = reference_lossless.DOCUMENT.read_text()
    dump = text[text.index("3c 00 00 00") :].splitlines()[:10]
    rows = [bytes.fromhex(line[:24]) if line[0] != " " else b"" for line in dump]
    payload = (GOLDEN / "example.payload").read_bytes()
    assert payload == b"".join(rows[:7]) + 3 * rows[6] + b"".join(rows[7:])
