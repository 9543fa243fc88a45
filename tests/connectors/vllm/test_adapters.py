"""Adapters are known by their content, and only as long as it is certain which content the engine holds."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore_s3.connectors.vllm.adapters import AdapterDigests
from kvstore_s3.errors import InvalidArgumentError


def adapter(path: Path, weights: bytes = b"weights") -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (path / "adapter_model.safetensors").write_bytes(weights)
    return str(path)


def find(digests: AdapterDigests, adapter_id: int, path: str, **more: Any) -> bytes:
    return asyncio.run(digests.find(adapter_id, path, **more))


def test_the_same_content_under_another_name_is_the_same_adapter(tmp_path: Path):
    digests = AdapterDigests(tmp_path / "cache")
    first, second = adapter(tmp_path / "a"), adapter(tmp_path / "b")
    assert find(digests, 1, first) == find(digests, 2, second)
    assert len(find(digests, 1, first)) == 32


def test_other_content_is_another_adapter(tmp_path: Path):
    digests = AdapterDigests(tmp_path / "cache")
    assert find(digests, 1, adapter(tmp_path / "a")) != find(digests, 2, adapter(tmp_path / "b", b"other weights"))


def test_another_engine_finds_the_same_digest(tmp_path: Path):
    path = adapter(tmp_path / "a")
    assert find(AdapterDigests(tmp_path / "one"), 1, path) == find(AdapterDigests(tmp_path / "two"), 7, path)


def test_what_the_engine_does_with_adapters_is_part_of_the_digest(tmp_path: Path):
    path = adapter(tmp_path / "a")
    settings = [None, {"target_modules": ["q_proj"]}, {"lora_dtype": "float16"}]
    found = {
        find(AdapterDigests(tmp_path / "cache", SimpleNamespace(**each) if each else None), 1, path)
        for each in settings
    }
    assert len(found) == 3


def test_an_adapter_that_changed_under_its_id_is_not_known_any_more(tmp_path: Path):
    digests = AdapterDigests(tmp_path / "cache")
    path = adapter(tmp_path / "a")
    find(digests, 1, path)
    adapter(tmp_path / "a", b"changed")
    with pytest.raises(InvalidArgumentError, match="the engine may hold either"):
        find(digests, 1, path)
    adapter(tmp_path / "a")
    with pytest.raises(InvalidArgumentError, match="the engine may hold either"):
        find(digests, 1, path)
    assert find(digests, 2, path)


def test_an_id_that_comes_with_another_adapter_is_not_known(tmp_path: Path):
    digests = AdapterDigests(tmp_path / "cache")
    find(digests, 1, adapter(tmp_path / "a"))
    with pytest.raises(InvalidArgumentError, match="give changed adapters a new id"):
        find(digests, 1, adapter(tmp_path / "b", b"other weights"))


def test_an_adapter_that_is_loaded_in_place_is_not_known(tmp_path: Path):
    with pytest.raises(InvalidArgumentError, match="the engine may hold either"):
        find(AdapterDigests(tmp_path / "cache"), 1, adapter(tmp_path / "a"), in_place=True)


def test_a_hub_id_is_refused_with_what_to_do(tmp_path: Path):
    with pytest.raises(InvalidArgumentError, match="instead of a hub id"):
        find(AdapterDigests(tmp_path / "cache"), 1, "acme/adapter")


def test_a_directory_without_an_adapter_is_refused(tmp_path: Path):
    with pytest.raises(InvalidArgumentError, match="adapter_config"):
        find(AdapterDigests(tmp_path / "cache"), 1, str(tmp_path))


def test_files_that_are_not_readable_are_refused(tmp_path: Path):
    path = adapter(tmp_path / "a")
    os.remove(f"{path}/adapter_model.safetensors")
    os.symlink(tmp_path / "nowhere", f"{path}/adapter_model.safetensors")
    with pytest.raises(InvalidArgumentError):
        find(AdapterDigests(tmp_path / "cache"), 1, path)
