"""The digest of weights: what it covers, and when what was read once may be remembered."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.weights import _SETTLED_NS, _read_digest, _Stamp, weights_digest

OLD_FILE = Path(json.__file__)
"""A file that nobody has written for a while: content that may be remembered at once."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama", "text_config": {"dtype": "float32", "x": 1.0}}')
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    return directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*")) if cache.exists() else []


def entry_of(cache: Path) -> Path:
    (entry,) = (path for path in entries(cache) if path.is_file())
    return entry


def link_old_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(OLD_FILE)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a renamed file": lambda d: (d / "model.safetensors").rename(d / "other.safetensors"),
    "a second file": lambda d: (d / "b.safetensors").write_bytes(b""),
    "remote code": lambda d: (d / "modeling_x.py").write_text("x = 1"),
    "remote code in a folder": lambda d: ((d / "sub").mkdir(), (d / "sub" / "x.py").write_text("x = 1")),
    "quantisation settings": lambda d: (d / "hf_quant_config.json").write_text("{}"),
    "an adapter beside": lambda d: (d / "adapter_config.json").write_text("{}"),
    "a config field": lambda d: (d / "config.json").write_text('{"model_type": "llama", "eps": 1}'),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_decides_values_changes_the_digest(model: Path, cache: Path, change: Callable[[Path], object]) -> None:
    before = weights_digest(model, cache)
    change(model)
    assert weights_digest(model, cache) != before


UNCHANGED: dict[str, Callable[[Path], object]] = {
    "a tokenizer": lambda d: (d / "tokenizer.json").write_text("{}"),
    "the same weights in another format": lambda d: (d / "pytorch_model.bin").write_bytes(b"x"),
    "a nested dtype": lambda d: (d / "config.json").write_text('{"text_config": {"x": 1}, "model_type": "llama"}'),
    "hidden folders": lambda d: ((d / ".git").mkdir(), (d / ".git" / "x.py").write_text("x")),
}


@pytest.mark.parametrize("change", UNCHANGED.values(), ids=UNCHANGED)
def test_what_decides_no_values_leaves_the_digest(model: Path, cache: Path, change: Callable[[Path], object]) -> None:
    before = weights_digest(model, cache)
    change(model)
    assert weights_digest(model, cache) == before


def test_a_dtype_within_the_quantisation_config_counts(model: Path, cache: Path) -> None:
    found = set()
    for dtype in ("int4", "int8"):
        (model / "config.json").write_text(json.dumps({"quantization_config": {"dtype": dtype}}))
        found.add(weights_digest(model, cache))
    assert len(found) == 2


def test_the_digest_is_pinned(model: Path, cache: Path) -> None:
    assert weights_digest(model, cache) == "954b323777fe3aaadfc583488070cfb4f5f3f5984ad8f1bf6dc63fd9b846c765"


def test_other_weights_are_read_where_there_is_no_safetensors_file(model: Path, cache: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    before = weights_digest(model, cache)
    (model / "pytorch_model.bin").write_bytes(b"changed")
    assert weights_digest(model, cache) != before


def test_a_directory_without_weights_or_config_is_refused(model: Path, cache: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(InvalidArgumentError, match="no weights"):
        weights_digest(model, cache)
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InvalidArgumentError, match=r"no config\.json"):
            weights_digest(place, cache)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": ' * 5000, b"\xff"], ids=str)
def test_a_damaged_config_is_refused(model: Path, cache: Path, text: str | bytes) -> None:
    (model / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidArgumentError, match=r"config\.json"):
        weights_digest(model, cache)


def test_a_half_done_download_is_refused(model: Path, cache: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidArgumentError, match=r"lacks 1 of the 2 weight files .* such as model-2\.safetensors"):
        weights_digest(model, cache)
    (model / "model-2.safetensors").write_bytes(b"x")
    assert weights_digest(model, cache)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_which_file_a_tensor_is_taken_from_changes_the_digest(model: Path, cache: Path, suffix: str) -> None:
    (model / "model.safetensors").unlink()
    for name in ("a", "b"):
        (model / f"{name}.{suffix}").write_bytes(name.encode())
    index = model / f"model.{suffix}.index.json"

    def digest_with(weight_map: dict[str, str]) -> str:
        index.write_text(json.dumps({"metadata": {"total_size": len(weight_map)}, "weight_map": weight_map}))
        return weights_digest(model, cache)

    first = digest_with({"x": f"a.{suffix}", "y": f"b.{suffix}"})
    assert digest_with({"y": f"b.{suffix}", "x": f"a.{suffix}"}) == first  # in any order
    assert digest_with({"x": f"b.{suffix}", "y": f"a.{suffix}"}) != first
    assert digest_with({"x": f"a.{suffix}", "y": f"b.{suffix}", "z": f"b.{suffix}"}) != first
    index.unlink()
    assert weights_digest(model, cache) != first


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": ["model.safetensors"]}}], ids=str)
def test_an_index_that_says_no_file_is_refused(model: Path, cache: Path, index: object) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidArgumentError, match=r"index\.json has no weight_map"):
        weights_digest(model, cache)


def test_a_dangling_link_is_refused(model: Path, cache: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(model / "gone")
    with pytest.raises(InvalidArgumentError, match="no weights"):
        weights_digest(model, cache)


def test_an_old_file_is_remembered_and_not_read_again(model: Path, cache: Path) -> None:
    link_old_weights(model)
    true = weights_digest(model, cache)
    entry = entry_of(cache)
    known = json.loads(entry.read_text())
    assert known["path"] == str(OLD_FILE.resolve())
    entry.write_text(json.dumps({**known, "blake3": "0" * 64}))
    assert weights_digest(model, cache) != true  # it believed its memory: the file was not read
    entry.write_text(json.dumps({**known, "blake3": "0" * 64, "stamp": [*known["stamp"][:4], 1]}))
    assert weights_digest(model, cache) == true  # another ctime: it was


def test_what_is_remembered_is_private_and_leaves_no_temporary_file(model: Path, cache: Path) -> None:
    link_old_weights(model)
    weights_digest(model, cache)
    assert [stat.S_IMODE(path.stat().st_mode) for path in entries(cache)] == [0o700, 0o600]


@pytest.mark.parametrize("damage", ["", "[]", "{}", "null", '{"path": 1}', "[" * 5000, "\x00"], ids=range(7))
def test_a_damaged_memory_costs_a_read_and_is_mended(model: Path, cache: Path, damage: str) -> None:
    link_old_weights(model)
    true = weights_digest(model, cache)
    entry = entry_of(cache)
    whole = entry.read_text()
    for text in (damage, json.dumps({**json.loads(whole), "blake3": "../x"})):
        entry.write_text(text)
        assert weights_digest(model, cache) == true
        assert entry.read_text() == whole


def test_a_young_file_is_not_remembered(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore_s3.weights._SETTLED_NS", 10**12)  # or it may be old enough by now
    weights_digest(model, cache)
    assert entries(cache) == []


def test_a_stamp_is_trusted_only_when_both_times_are_older_than_a_clock_tick() -> None:
    now = time.time_ns()
    old = now - _SETTLED_NS - 1
    assert _Stamp(1, 1, 1, old, old).is_settled(now)
    assert not _Stamp(1, 1, 1, old, now - _SETTLED_NS).is_settled(now)
    assert not _Stamp(1, 1, 1, now - _SETTLED_NS, old).is_settled(now)
    assert not _Stamp(1, 1, 1, old, now + 10**12).is_settled(now)


def test_a_write_that_hides_behind_the_old_mtime_is_seen(model: Path, cache: Path) -> None:
    weights = model / "model.safetensors"
    time.sleep(_SETTLED_NS / 1e9 + 0.1)  # the file has to age: no one can set a ctime
    before, times = weights_digest(model, cache), weights.stat()
    assert len(entries(cache)) == 2
    with weights.open("r+b") as file:
        file.seek(1000)
        file.write(b"\x00")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (weights.stat().st_mtime_ns, weights.stat().st_size) == (times.st_mtime_ns, times.st_size)
    assert weights_digest(model, cache) != before


def skip_where_maps_leave_no_trace(path: Path) -> None:
    """Skip on file systems such as tmpfs, where a page that was written through a map is never clean again."""
    path.write_bytes(bytes(4096))
    mapped = np.memmap(path, np.uint8, "r+")
    mapped[0] = 1
    with path.open("rb") as file:
        os.fsync(file.fileno())
    before = path.stat()
    time.sleep(0.05)  # longer than a clock tick
    mapped[0] = 2
    if path.stat().st_ctime_ns == before.st_ctime_ns:
        pytest.skip("this file system does not stamp writes through a memory map")


def test_a_second_write_through_one_memory_map_is_seen(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_where_maps_leave_no_trace(tmp_path / "probe")
    monkeypatch.setattr("kvstore_s3.weights._SETTLED_NS", 50_000_000)
    mapped = np.memmap(model / "model.safetensors", np.uint8, "r+")
    mapped[1000] = 1
    time.sleep(0.2)  # the file has to age: no one can set a ctime
    before = weights_digest(model, cache)
    assert len(entries(cache)) == 2
    mapped[1000] = 2
    assert weights_digest(model, cache) != before


def test_a_file_that_cannot_be_written_back_is_read_all_the_same(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights_digest(model, cache)

    def fail(_: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", fail)
    assert weights_digest(model, cache) == before


def test_a_file_that_changes_while_it_is_read_is_refused(model: Path) -> None:
    weights = model / "model.safetensors"
    stamp = _Stamp.of(weights.stat())
    weights.write_bytes(b"shorter")
    with (
        weights.open("rb", buffering=0) as file,
        pytest.raises(InvalidArgumentError, match=r"safetensors changed while it was read"),
    ):
        _read_digest(file, stamp)


def test_writers_at_the_same_time_do_not_disturb_each_other(model: Path, cache: Path, tmp_path: Path) -> None:
    link_old_weights(model)
    copies = [Path(shutil.copytree(model, tmp_path / str(n), symlinks=True)) for n in range(4)]
    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda n: weights_digest(copies[n % 4], cache), range(32)))
    assert len(digests) == 1
    assert len(entries(cache)) == 2


def test_a_cache_that_cannot_be_written_is_said_and_costs_a_read(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link_old_weights(model)
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert weights_digest(model, tmp_path / "file" / "cache") == weights_digest(model, tmp_path / "good")
    assert "each start reads all weights" in caplog.text
