"""Chunk keys: pinned values, prefixes, one key for one sequence whatever holds it, and what is refused."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.hashing import as_token_array, chunk_keys, root_key
from kvstore_s3.namespace import Namespace

TESTS = Path(__file__).resolve().parent
CASES = json.loads((TESTS / "golden" / "keys.json").read_text(encoding="ascii"))
DIGEST = bytes(range(32))
ROOT = root_key(DIGEST, None)

token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=80)
salts = st.none() | st.text(max_size=8) | st.binary(max_size=8)


def tokens_of(case: dict[str, Any]) -> list[int]:
    first, step, count = (case["tokens"][name] for name in ("first", "step", "count"))
    return [(first + index * step) % 2**32 for index in range(count)]


def salt_of(case: dict[str, Any]) -> bytes | None:
    return bytes.fromhex(case["salt_hex"]) if "salt_hex" in case else None


def extra_of(case: dict[str, Any]) -> dict[int, bytes]:
    return {int(index): bytes.fromhex(value) for index, value in case.get("extra_hex", {}).items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_keys_are_those_that_are_pinned(case: dict[str, Any]) -> None:
    namespace = Namespace.from_json(json.dumps(case["namespace"]))
    root = root_key(namespace.digest, salt_of(case))
    keys = chunk_keys(root, tokens_of(case), namespace.chunk_tokens, extra_keys=extra_of(case))
    assert namespace.to_json() == case["namespace_json"]
    assert (namespace.hex, root.hex(), [key.hex() for key in keys]) == (
        case["namespace_hex"],
        case["root"],
        case["keys"],
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_keys_follow_from_the_document_alone(case: dict[str, Any]) -> None:
    """docs/format-keys.md in ten lines, without the package."""
    digest = blake3(case["namespace_json"].encode("ascii"), derive_key_context="kvstore-s3 v1 namespace").digest()
    salt = salt_of(case)
    preimage = digest + (b"\x00" if salt is None else b"\x01" + salt)
    parent = blake3(preimage, derive_key_context="kvstore-s3 v1 root key").digest()
    ids, size, keys = tokens_of(case), case["namespace"]["chunk_tokens"], []
    for index in range(len(ids) // size):
        packed = struct.pack(f"<{size}I", *ids[index * size : (index + 1) * size])
        parent = blake3(parent + packed + extra_of(case).get(index, b"")).digest()
        keys.append(parent.hex())
    assert keys == case["keys"]


def test_every_value_in_the_format_document_is_pinned() -> None:
    document = (TESTS.parent / "docs" / "format-keys.md").read_text(encoding="utf-8")
    values = set(re.findall(r"\b[0-9a-f]{64}\b", document))
    pinned = {value for case in CASES for value in (case["namespace_hex"], case["root"], *case["keys"])}
    assert values
    assert values <= pinned
    assert CASES[0]["namespace_json"] in document


@pytest.mark.parametrize("seed", ["0", "1", "random"])
def test_keys_are_equal_in_processes_with_other_hash_seeds(seed: str) -> None:
    script = (
        "import json, sys; from kvstore_s3.hashing import *; from kvstore_s3.namespace import Namespace\n"
        "namespace = Namespace.from_json(sys.stdin.read())\n"
        "print(namespace.hex, *(key.hex() for key in chunk_keys(root_key(namespace.digest, None), range(33), 16)))\n"
        "assert 'torch' not in sys.modules"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(CASES[0]["namespace"]),
        env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    assert run.stdout.split() == [CASES[0]["namespace_hex"], *CASES[0]["keys"]]


@given(token_ids, token_ids, st.integers(1, 16))
def test_keys_of_a_prefix_are_a_prefix_of_the_keys(prefix: list[int], rest: list[int], size: int) -> None:
    short, long = chunk_keys(ROOT, prefix, size), chunk_keys(ROOT, prefix + rest, size)
    assert len(short) == len(prefix) // size
    assert long[: len(short)] == short


@given(token_ids.filter(len), st.integers(1, 8), st.data())
def test_one_other_token_changes_the_keys_from_its_chunk_on(ids: list[int], size: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(ids) - 1))
    other = ids.copy()
    other[position] ^= 1 << data.draw(st.integers(0, 31))
    before, after = chunk_keys(ROOT, ids, size), chunk_keys(ROOT, other, size)
    assert [a == b for a, b in zip(before, after, strict=True)] == [i < position // size for i in range(len(before))]


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40))
def test_lists_arrays_and_tensors_of_the_same_ids_have_the_same_keys(ids: list[int]) -> None:
    same: list[Any] = [
        tuple(ids),
        array("I", ids),
        [np.int64(value) for value in ids],
        *(np.array(ids, dtype=dtype) for dtype in ("<u4", ">u4", "i4", "u8", "<i8", ">i8")),
        np.array([ids], dtype="i8"),
        np.repeat(np.array(ids, dtype="i8"), 2)[::2],
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor([ids], dtype=torch.int32),
        torch.tensor(ids, dtype=torch.int64).to(torch.uint32),
    ]
    expected = chunk_keys(ROOT, ids, 4)
    assert all(chunk_keys(ROOT, other, 4) == expected for other in same)
    assert all(as_token_array(other).dtype == np.dtype("<u4") for other in same)
    assert all(as_token_array(other).tolist() == ids for other in same)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"])
def test_every_integer_dtype_is_taken(dtype: str) -> None:
    assert as_token_array(np.array([0, 1, 127], dtype=dtype)).tolist() == [0, 1, 127]
    assert as_token_array(torch.tensor(np.array([0, 1, 127], dtype=dtype))).tolist() == [0, 1, 127]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_on_a_gpu_is_taken() -> None:
    assert as_token_array(torch.arange(5, device="cuda")).tolist() == [0, 1, 2, 3, 4]


@given(salts, salts)
def test_different_salts_share_no_root(one: str | bytes | None, other: str | bytes | None) -> None:
    as_bytes = [salt.encode() if isinstance(salt, str) else salt for salt in (one, other)]
    assert (root_key(DIGEST, one) == root_key(DIGEST, other)) == (as_bytes[0] == as_bytes[1])


def test_an_extra_key_changes_its_chunk_and_all_after_it() -> None:
    plain = chunk_keys(ROOT, range(16), 4)
    bound = chunk_keys(ROOT, range(16), 4, extra_keys={2: b"image"})
    assert [a == b for a, b in zip(plain, bound, strict=True)] == [True, True, False, False]
    assert bound != chunk_keys(ROOT, range(16), 4, extra_keys={2: b"other"})
    assert bound[3] != chunk_keys(ROOT, range(16), 4, extra_keys={3: b"image"})[3]


def test_an_extra_key_behind_the_last_whole_chunk_has_no_effect() -> None:
    assert chunk_keys(ROOT, range(7), 4, extra_keys={1: b"image"}) == chunk_keys(ROOT, range(7), 4)


BAD_IDS = [
    ([1, 2, -3], "-3 at position 2"),
    ([2**32], "4294967296 at position 0"),
    ([10**40], "0000... at position 0"),
    ([1, True], "True at position 1"),
    ([1, np.True_], "True.* at position 1"),
    ([1, 2.0], r"2\.0 at position 1"),
    ([1, None], "None at position 1"),
    (["1"], "'1' at position 0"),
    ([[1, 2]], r"\[1, 2\] at position 0"),
    (np.array([0, 2**40, -1]), "1099511627776 at position 1"),
    (np.array([5, -1], dtype="i1"), "-1 at position 1"),
    (np.array([1.0]), "float64"),
    (np.array([True]), "bool"),
    (np.array([1, "x"], dtype=object), "object"),
    (np.zeros((2, 3), dtype="i8"), r"\[2, 3\]"),
    (np.zeros((), dtype="i8"), r"\[\]"),
    (torch.tensor([1.0], dtype=torch.bfloat16), "bfloat16"),
    (torch.tensor([True]), "bool"),
    (torch.tensor([7, -9]), "-9 at position 1"),
    (torch.zeros((2, 3), dtype=torch.int64), r"\[2, 3\]"),
    (torch.zeros(3, dtype=torch.int64, device="meta"), "holds data"),
    ("123", "not str"),
    (b"123", "not bytes"),
    (7, "not int"),
    (None, "not NoneType"),
    ({1, 2}, "not set"),
]


@pytest.mark.parametrize(("ids", "found"), BAD_IDS, ids=str)
def test_what_is_no_row_of_token_ids_is_refused_by_position_and_value(ids: Any, found: str) -> None:
    with pytest.raises(InvalidArgumentError, match=found):
        as_token_array(ids)


def test_a_wrong_root_salt_size_or_extra_key_is_refused() -> None:
    bad_calls: list[Any] = [
        lambda: root_key(b"short", None),
        lambda: root_key(DIGEST.hex(), None),  # type: ignore[arg-type]
        lambda: root_key(DIGEST, 7),  # type: ignore[arg-type]
        lambda: root_key(DIGEST, "\ud800"),
        lambda: chunk_keys(b"", [1], 1),
        lambda: chunk_keys(ROOT, [1], 0),
        lambda: chunk_keys(ROOT, [1], True),
        lambda: chunk_keys(ROOT, [1], 1, extra_keys={0: b""}),
        lambda: chunk_keys(ROOT, [1], 1, extra_keys={-1: b"x"}),
        lambda: chunk_keys(ROOT, [1], 1, extra_keys={0: "x"}),  # type: ignore[dict-item]
    ]
    for call in bad_calls:
        with pytest.raises(InvalidArgumentError):
            call()
