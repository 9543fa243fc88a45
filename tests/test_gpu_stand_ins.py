"""What stands in for Python packages in `make gpu-check` does what the packages do."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import blake3
import numpy as np
import pytest
import safetensors
import xxhash
import zstandard
from safetensors.numpy import save

import kvstore_s3.config

FOLDER = Path(__file__).resolve().parent.parent / ".ci" / "gpu-stand-ins"
DATA = random.Random(5).randbytes(3_000_000)
LENGTHS_OF_SHORT_INPUT = 1025
MODES = ({}, {"key": DATA[:32]}, {"derive_key_context": "kvstore-s3 a context"})


def load(name: str) -> ModuleType:
    """A stand-in under another name, for the package itself is here."""
    spec = importlib.util.spec_from_file_location(f"stand_in_for_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    headers = Path(sysconfig.get_path("include"))
    if shutil.which("c++") is None or not (headers / "Python.h").exists():
        pytest.skip("the stand-ins' hashing is compiled, which takes c++ and Python.h")
    folder = tmp_path_factory.mktemp("digests")
    flags = [
        "-std=c++20",
        "-O2",
        "-march=native",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-isystem",
        str(headers),
    ]
    subprocess.run(["c++", *flags, str(FOLDER / "digests.cpp"), "-o", str(folder / "_digests.so")], check=True)
    sys.path.append(str(folder))
    yield
    sys.path.remove(str(folder))


def test_xxh3_gives_the_packages_digests_of_each_length(digests: None) -> None:
    ours = load("xxhash")
    for length in [*range(LENGTHS_OF_SHORT_INPUT), 2048, 2049, 65536, 1_000_003, len(DATA)]:
        data = DATA[:length]
        assert ours.xxh3_128_digest(data) == xxhash.xxh3_128_digest(data), length


@pytest.mark.parametrize("mode", MODES, ids=["plain", "keyed", "derived"])
def test_blake3_gives_the_packages_digests_of_each_length(digests: None, mode: dict[str, object]) -> None:
    ours = load("blake3").blake3
    chunks = [1024 * count + more for count in range(1, 34) for more in (-1, 0, 1)]
    for length in [*range(200), *chunks, 5000, 65536, 1_000_003, len(DATA)]:
        data = DATA[:length]
        assert ours(data, **mode).digest() == blake3.blake3(data, **mode).digest(), length
        assert ours(data, **mode).hexdigest(200) == blake3.blake3(data, **mode).hexdigest(200), length


def test_hashes_take_their_input_in_any_pieces(digests: None) -> None:
    draw = random.Random(6)
    for _ in range(200):
        hashes = [load_once("blake3").blake3(), load_once("xxhash").xxh3_128(), blake3.blake3(), xxhash.xxh3_128()]
        for _ in range(draw.randint(0, 6)):
            size, start = draw.choice([0, 1, 63, 64, 65, 1024, 1025, draw.randint(0, 30_000)]), draw.randint(0, 999)
            for one in hashes:
                one.update(memoryview(DATA)[start : start + size])
        copies = [one.copy() for one in hashes]
        for one in hashes:
            one.update(b"more")
        for found in (hashes, copies):
            assert [one.digest() for one in found[:2]] == [one.digest() for one in found[2:]]


def load_once(name: str) -> ModuleType:
    return sys.modules.get(f"stand_in_for_{name}") or load(name)


def test_hashes_refuse_what_they_do_not_do(digests: None) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        load("blake3").blake3(b"", key=b"short")
    with pytest.raises(TypeError):
        load("blake3").blake3().digest(32, seek=64)
    with pytest.raises(TypeError):
        load("xxhash").xxh3_128(b"", seed=1)


@pytest.mark.parametrize("data", [b"", b"a", DATA[:1000], bytes(300_000), DATA[:300_000] + bytes(200_000)], ids=len)
def test_zstd_frames_are_sound_and_are_read_back(data: bytes) -> None:
    ours = load("zstandard")
    frame = ours.ZstdCompressor(level=3).compress(data)
    assert zstandard.get_frame_parameters(frame).content_size == len(data)
    assert zstandard.ZstdDecompressor().decompress(frame, max_output_size=len(data)) == data
    read = ours.ZstdDecompressor().decompress(memoryview(frame), max_output_size=len(data), allow_extra_data=False)
    assert read == data


def test_zstd_frames_that_others_wrote_are_refused() -> None:
    ours = load("zstandard")
    frame = zstandard.ZstdCompressor(level=3).compress(b"ab" * 10_000)
    with pytest.raises(ours.ZstdError, match="without the package zstandard"):
        ours.ZstdDecompressor().decompress(frame, max_output_size=20_000, allow_extra_data=False)
    cut = ours.ZstdCompressor(level=3).compress(DATA[:500])[:-1]
    with pytest.raises(ours.ZstdError):
        ours.ZstdDecompressor().decompress(cut, max_output_size=500, allow_extra_data=False)


def test_tensors_are_read_as_the_package_reads_them() -> None:
    ours = load("safetensors")
    data = save({"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.arange(3, dtype=np.uint16)}, {"x": "y"})
    assert dict(ours.deserialize(data)) == dict(safetensors.deserialize(data))


@pytest.mark.parametrize(
    "data",
    [
        b"short",
        struct.pack("<Q", 1000) + b"{}",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 2) + b"{}more",
        struct.pack("<Q", 54) + b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1]' + b"]}" + b"x",
    ],
)
def test_files_that_the_package_refuses_are_refused(data: bytes) -> None:
    ours = load("safetensors")
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(data)
    with pytest.raises(ours.SafetensorError):
        ours.deserialize(data)


def test_every_strategy_of_the_devices_tests_can_be_drawn() -> None:
    ours, tests = load("hypothesis").strategies, Path(__file__).resolve().parent
    texts = [file.read_text() for file in [*(tests / "device").glob("*.py"), tests / "codec" / "sections.py"]]
    used = {name for text in texts for name in re.findall(r"\bst\.(\w+)", text)}
    assert "integers" in used
    assert not {name for name in used if not hasattr(ours, name)}
    pair = ours.tuples(ours.integers(3, 5), ours.lists(ours.booleans(), min_size=1, max_size=2))
    assert all(3 <= number <= 5 and 1 <= len(some) <= 2 for number, some in map(pair, map(random.Random, range(50))))


def test_what_the_devices_tests_use_of_pytest_is_there() -> None:
    ours, tests = load("pytest"), Path(__file__).resolve().parent
    files = [*(tests / "device").glob("*.py"), tests / "conftest.py", tests / "slab_watch.py"]
    text = "\n".join(file.read_text() for file in files)
    used, marks = set(re.findall(r"\bpytest\.([A-Za-z]\w*)", text)), set(re.findall(r"\bpytest\.mark\.(\w+)", text))
    assert {"raises", "mark"} <= used
    assert not {name for name in used - {"Config", "FixtureRequest", "Item", "Session"} if not hasattr(ours, name)}
    assert not {name for name in marks if not hasattr(ours.mark, name)}
    for fixture, kind in (("caplog", ours.LogCaptureFixture()), ("monkeypatch", ours.MonkeyPatch)):
        assert not {name for name in re.findall(rf"\b{fixture}\.(\w+)", text) if not hasattr(kind, name)}


TESTS = """
import asyncio, pytest
TIMES = 2
from hypothesis import given, strategies as st

@pytest.fixture(scope="module")
def number():
    yield 2

@pytest.fixture(params=range(2), ids=lambda seed: f"seed {seed}")
def seed(request):
    return request.param

@pytest.fixture
def grown(seed, number):
    return seed + number

def test_with_each_param(grown, seed):
    assert grown == seed + 2

@pytest.mark.parametrize("second", [1, 2], ids=["one", "two"])
@pytest.mark.parametrize(("first", "third"), [(1, 2)])
def test_product(number, first, second, third):
    assert second in (1, 2)
    assert first * third == number

async def test_async(tmp_path, monkeypatch):
    monkeypatch.setenv("A_NAME", "x")
    monkeypatch.setattr(f"{__name__}.TIMES", 3)
    assert TIMES == 3
    await asyncio.sleep(0)
    assert tmp_path.is_dir()

def test_what_was_patched_is_as_before():
    assert TIMES == 2

@pytest.mark.skipif(True, reason="not here")
def test_skipped():
    raise AssertionError

def test_raises():
    with pytest.raises(ValueError, match="wrong") as caught:
        raise ValueError("wrong")
    assert caught.value.args == ("wrong",)

@given(st.integers(0, 9))
def test_drawn(number, drawn):
    assert 0 <= drawn <= 9 and number == 2
"""
WRONG = {
    "def test_false(): assert 1 == 2": "assert 1 == 2",
    "async def test_false(): assert 1 == 2": "assert 1 == 2",
    "def test_unknown(nothing): pass": "no fixture 'nothing'",
    "import pytest\ndef test_calm():\n    with pytest.raises(ValueError): pass": "did not raise",
    "import pytest\n@pytest.mark.xfail\ndef test_marked(): pass": "knows no mark 'xfail'",
    "from hypothesis import given, strategies as st\n@given(st.integers(0, 9))\ndef test_drawn(n): assert n < 9": "[9]",
}


def run_stand_in(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(text)
    (folder / "it.ini").write_text("[pytest]\npythonpath = .\ncache_dir = cache\n")
    command = [sys.executable, "-m", "pytest", "-c", "it.ini", "--rootdir", ".", "-q", "test_it.py", *options]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_tests_run_without_pytest(tmp_path: Path) -> None:
    done = run_stand_in(tmp_path, TESTS)
    assert done.stdout.splitlines() == ["SKIPPED test_it.py::test_skipped: not here", "8 passed, 1 skipped"]
    assert done.returncode == 0
    assert run_stand_in(tmp_path, TESTS, "-k", "two or seed 1").stdout.splitlines() == ["2 passed"]
    assert run_stand_in(tmp_path, TESTS, "-k", "none").returncode == 5


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_tests_that_fail_fail_without_pytest(tmp_path: Path, text: str) -> None:
    done = run_stand_in(tmp_path, text + "\n\ndef test_other(): pass\n")
    assert done.returncode == 1
    assert WRONG[text] in done.stdout
    assert "1 failed" in done.stdout.splitlines()[-1]


@pytest.fixture(params=["all stand-ins", "pydantic itself"])
def settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """kvstore_s3.config upon the stand-ins."""
    packages = ["pydantic_core", "pydantic"] if request.param == "all stand-ins" else []
    spec = importlib.util.spec_from_file_location("settings_upon_stand_ins", kvstore_s3.config.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    with pytest.MonkeyPatch.context() as patch:
        for name in [*packages, "pydantic_settings"]:
            patch.setitem(sys.modules, name, load(name))
        spec.loader.exec_module(module)
    return module


def test_settings_have_their_defaults_and_what_is_given(settings: ModuleType) -> None:
    given = {"chunk_tokens": 32, "device_share": 1, "nvme_tier_dir": "/tmp/x", "lowest_profile": "small", "store": None}
    found, expected = settings.load_settings(**given), kvstore_s3.config.load_settings(**given)
    for name in kvstore_s3.config.Settings.model_fields:
        assert getattr(found, name) == getattr(expected, name)
        assert type(getattr(found, name)) is type(getattr(expected, name))
    assert found.model_copy(update={"profile": "small"}).profile == "small"


@pytest.mark.parametrize(
    "given",
    [
        {"chunk_tokens": 17},
        {"chunk_tokens": 8},
        {"device_share": 0},
        {"device_share": 1.5},
        {"profile": "best"},
        {"upload_bytes": None, "chunk_tokns": 16},
        {"nvme_tier_dir": "relative"},
        {"path_style": 3},
    ],
    ids=str,
)
def test_settings_that_are_wrong_are_refused(settings: ModuleType, given: dict[str, object]) -> None:
    for module in (settings, kvstore_s3.config):
        with pytest.raises(module.InvalidArgumentError, match=list(given)[-1]):
            module.load_settings(**given)


def test_settings_are_read_from_nowhere_else(settings: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_S3_CHUNK_TOKENS", "32")
    with pytest.raises(settings.InvalidArgumentError, match="KVSTORE_S3_CHUNK_TOKENS is not read"):
        settings.load_settings()
