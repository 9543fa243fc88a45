"""Namespaces: every field counts, one canonical JSON, and one digest for one model wherever it lies."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_s3.errors import InvalidArgumentError, UnsupportedModelError
from kvstore_s3.hashing import chunk_keys, root_key
from kvstore_s3.layout import KVLayout
from kvstore_s3.namespace import FORMAT, Namespace, canonical_json

ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.5,
    "truncate": False,
    "mrope_section": [16, 24, 24],
    "original_max_position_embeddings": 4096,
}
LAYOUT = KVLayout(layers=2, kv_heads=4, head_dim=64, dtype="bfloat16", rope=ROPE)
NAMESPACE = Namespace(model="LlamaForCausalLM", revision="abc", layout=LAYOUT, chunk_tokens=16)

ROPE_CHANGES = {
    "rope_type": "linear",
    "rope_theta": 10000.000000000002,
    "factor": 4.25,
    "truncate": True,
    "mrope_section": [16, 24, 25],
    "original_max_position_embeddings": 4097,
}
LAYOUT_CHANGES: dict[str, list[Any]] = {
    "layers": [3],
    "kv_heads": [2],
    "head_dim": [128],
    "dtype": ["float16"],
    "attention": [],  # "full" is the only value: the layout refuses all others
    "rope": [
        *({**ROPE, name: value} for name, value in ROPE_CHANGES.items()),
        *({other: value for other, value in ROPE.items() if other != name} for name in ROPE if name != "rope_type"),
        {**ROPE, "mscale": 1.0},
    ],
}
NAMESPACE_CHANGES: dict[str, list[Any]] = {
    "model": ["MistralForCausalLM", "LlamaForCausalLM "],
    "revision": ["abd"],
    "layout": [
        dataclasses.replace(LAYOUT, **{name: value}) for name, values in LAYOUT_CHANGES.items() for value in values
    ],
    "chunk_tokens": [32],
    "lora": ["weights:1"],
    "variant": ["weights:1", "fp8"],
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
}


def keys_of(namespace: Namespace) -> list[bytes]:
    return chunk_keys(root_key(namespace.digest, None), range(64), 16)


def write_model(directory: Path, **changes: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return directory


def test_this_file_covers_every_field() -> None:
    assert set(NAMESPACE_CHANGES) == {field.name for field in dataclasses.fields(Namespace) if field.init}
    assert set(LAYOUT_CHANGES) == {field.name for field in dataclasses.fields(KVLayout)}
    assert set(ROPE_CHANGES) == set(ROPE)
    assert set(json.loads(NAMESPACE.to_json())) == {*NAMESPACE_CHANGES, "format"}
    assert set(LAYOUT.to_json()) == set(LAYOUT_CHANGES)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in NAMESPACE_CHANGES.items() for value in values],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_changed_field_changes_the_digest_and_every_chunk_key(name: str, value: Any) -> None:
    changed = dataclasses.replace(NAMESPACE, **{name: value})
    assert changed != NAMESPACE
    assert changed.digest != NAMESPACE.digest
    assert set(keys_of(changed)).isdisjoint(keys_of(NAMESPACE))


def test_all_changes_differ_from_each_other() -> None:
    changed = [
        dataclasses.replace(NAMESPACE, **{n: value}) for n, values in NAMESPACE_CHANGES.items() for value in values
    ]
    assert len({namespace.digest for namespace in changed}) == len(changed)


def test_the_canonical_json_is_sorted_short_ascii_with_integers_for_integral_floats() -> None:
    assert canonical_json({"b": 10000.0, "a": [1.5, -0.0, 1e300 / 1e280], "ü": "é\n", "c": None, "d": True}) == (
        '{"a":[1.5,0,100000000000000000000],"b":10000,"c":null,"d":true,"\\u00fc":"\\u00e9\\n"}'
    )
    assert canonical_json(0.1 + 0.2) == "0.30000000000000004"


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {"a": [-float("inf")]}, {1: 2}, {"a": b"x"}, {"a": {1, 2}}]
)
def test_what_has_no_one_spelling_is_refused(value: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        canonical_json(value)


def test_floats_and_ints_of_the_same_value_give_one_digest() -> None:
    whole = dataclasses.replace(NAMESPACE, layout=dataclasses.replace(LAYOUT, rope={**ROPE, "rope_theta": 10000}))
    assert whole.digest == NAMESPACE.digest
    assert whole == NAMESPACE
    assert hash(whole) == hash(NAMESPACE)


def test_a_namespace_survives_json_whatever_its_white_space_and_order() -> None:
    for text in (NAMESPACE.to_json(), json.dumps(json.loads(NAMESPACE.to_json()), indent=2, sort_keys=False)):
        assert Namespace.from_json(text) == NAMESPACE
        assert Namespace.from_json(text.encode()).digest == NAMESPACE.digest
    assert NAMESPACE.hex == NAMESPACE.digest.hex()
    assert json.loads(NAMESPACE.to_json())["format"] == FORMAT


def damaged(**changes: Any) -> str:
    return json.dumps({**json.loads(NAMESPACE.to_json()), **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        b"\xff\xfe",
        "[" * 60000,
        " " * 70000,
        damaged(format=2),
        damaged(format=None),
        damaged(surprise=1),
        damaged(layout=None),
        damaged(layout={}),
        damaged(chunk_tokens="16"),
        damaged(model=None),
        damaged(lora=7),
        NAMESPACE.to_json().replace('"lora":null', '"lora":null,"lora":"x"'),
        NAMESPACE.to_json().replace("4.5", "NaN"),
        NAMESPACE.to_json().replace("4.5", "1e999"),
        NAMESPACE.to_json().replace("4.5", "[" * 500 + "]" * 500),
    ],
    ids=range(18),
)
def test_a_damaged_or_hostile_document_is_refused(text: str | bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        Namespace.from_json(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ""},
        {"model": "a\nb"},
        {"model": "x" * 1025},
        {"revision": None},
        {"lora": ""},
        {"variant": 8},
        {"layout": {"layers": 1}},
        *({"chunk_tokens": value} for value in (0, 8, 17, 65552, 256.0, True, None)),
    ],
    ids=str,
)
def test_a_field_of_a_wrong_value_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(changes))):
        dataclasses.replace(NAMESPACE, **changes)


def test_one_model_directory_gives_one_digest_wherever_it_lies(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    first = Namespace.from_model(model, cache_dir=tmp_path / "cache")
    copied = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in model.iterdir():
        (linked / path.name).symlink_to(path)
    for place in (copied, linked, str(copied) + "/"):
        assert Namespace.from_model(place, cache_dir=tmp_path / "cache") == first
    assert first.model == "LlamaForCausalLM"
    assert first.revision.startswith("weights:")
    assert first.layout == KVLayout.from_config(CONFIG)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"transformers_version": "5.0.0"}, True),
        ({"use_cache": False, "_name_or_path": "/somewhere"}, True),
        ({"torch_dtype": None, "dtype": "bfloat16"}, True),
        ({"rms_norm_eps": 1e-5}, False),
        ({"rope_theta": 20000.0}, False),
        ({"attention_bias": True}, False),
        ({"torch_dtype": "float16"}, False),
        ({"architectures": ["OtherForCausalLM"]}, False),
    ],
    ids=str,
)
def test_a_config_field_counts_if_it_changes_values(tmp_path: Path, changes: dict[str, Any], same: bool) -> None:
    base = Namespace.from_model(write_model(tmp_path / "base"), cache_dir=tmp_path / "cache")
    other = Namespace.from_model(write_model(tmp_path / "other", **changes), cache_dir=tmp_path / "cache")
    assert (other == base) is same
    assert (other.digest == base.digest) is same


def test_a_changed_byte_of_the_weights_changes_the_digest(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    before = Namespace.from_model(model, cache_dir=tmp_path / "cache")
    content = bytearray((model / "model.safetensors").read_bytes())
    content[5000] ^= 1
    (model / "model.safetensors").write_bytes(content)
    after = Namespace.from_model(model, cache_dir=tmp_path / "cache")
    assert set(keys_of(after)).isdisjoint(keys_of(before))


def test_the_arguments_of_from_model_enter_the_namespace(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    cache = tmp_path / "cache"
    plain = Namespace.from_model(model, cache_dir=cache)
    assert Namespace.from_model(model, cache_dir=cache, dtype=torch.float16).layout.dtype == "float16"
    assert Namespace.from_model(model, cache_dir=cache, chunk_tokens=64).chunk_tokens == 64
    assert Namespace.from_model(model, cache_dir=cache, variant="fp8").variant == "fp8"
    assert Namespace.from_model(model, revision="v2", cache_dir=cache) == dataclasses.replace(plain, revision="v2")
    assert Namespace.from_model(model, cache_dir=cache, layout=LAYOUT).layout == LAYOUT
    with pytest.raises(InvalidArgumentError, match="not both"):
        Namespace.from_model(model, cache_dir=cache, layout=LAYOUT, dtype="float16")
    with pytest.raises(InvalidArgumentError, match="revision"):
        Namespace.from_model(model, revision="", cache_dir=cache)


def test_a_given_revision_reads_no_weights(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    assert Namespace.from_model(model, revision="commit", cache_dir=tmp_path / "cache").revision == "commit"


def test_an_adapter_counts_by_its_content(tmp_path: Path) -> None:
    model, cache = write_model(tmp_path / "model"), tmp_path / "cache"
    found = []
    for name, rank, content in (("a", 8, b"1"), ("b", 8, b"1"), ("c", 16, b"1"), ("d", 8, b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank, "base_model_name_or_path": name}))
        (tmp_path / name / "adapter_model.safetensors").write_bytes(content)
        found.append(Namespace.from_model(model, lora=tmp_path / name, cache_dir=cache).digest)
    assert found[0] == found[1]
    assert len({*found, Namespace.from_model(model, cache_dir=cache).digest}) == 4
    with pytest.raises(InvalidArgumentError, match="directory of an adapter"):
        Namespace.from_model(model, lora="a-name", cache_dir=cache)


def test_an_unsuitable_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", model_type="gemma2", sliding_window=4096)
    (model / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="gemma2: sliding_window"):
        Namespace.from_model(model, cache_dir=tmp_path / "cache")


def test_a_place_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgumentError, match=r"config\.json"):
        Namespace.from_model(tmp_path / "empty", cache_dir=tmp_path)
    for name in (tmp_path / "nothing", str(tmp_path / "nothing"), "./nothing", "a/b/c", ""):
        with pytest.raises(InvalidArgumentError, match=r"no model directory|config\.json"):
            Namespace.from_model(name, cache_dir=tmp_path)


def test_the_default_cache_directory_is_that_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_S3_CACHE_DIR", str(tmp_path / "cache"))
    model = write_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(Path(json.__file__))  # a file old enough to be remembered
    Namespace.from_model(model)
    assert any((tmp_path / "cache").rglob("*.json"))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def from_hub(home: Path, expression: str) -> str:
    """Evaluate an expression on Namespace in a process that has only the hub's cache under `home`, and no network."""
    script = (
        "import sys; from pathlib import Path; from kvstore_s3 import Namespace, KVStoreError\n"
        "cache = Path(sys.argv[1])\n"
        f"try: print(({expression}).to_json())\nexcept KVStoreError as error: print(type(error).__name__, error)"
    )
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", script, str(home / "digests")],
        env={**environment, "PATH": os.environ["PATH"], "HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    return run.stdout.strip()


@pytest.fixture
def hub_home(tmp_path: Path) -> Path:
    """The hub's cache with one model in it, as links into its blobs."""
    pytest.importorskip("huggingface_hub")
    repository = tmp_path / "hub" / "models--acme--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    write_model(snapshot)
    for path in list(snapshot.iterdir()):
        path.rename(repository / "blobs" / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    return tmp_path


def test_a_hub_id_is_found_in_the_hubs_cache_and_equals_its_directory(hub_home: Path, tmp_path: Path) -> None:
    directory = Namespace.from_model(write_model(tmp_path / "model"), cache_dir=tmp_path / "cache")
    assert from_hub(hub_home, "Namespace.from_model('acme/tiny', cache_dir=cache)") == directory.to_json()


def test_a_commit_of_a_hub_id_is_its_revision(hub_home: Path) -> None:
    text = from_hub(hub_home, f"Namespace.from_model('acme/tiny', revision='{COMMIT}', cache_dir=cache)")
    assert Namespace.from_json(text).revision == COMMIT


def test_a_moving_revision_of_a_hub_id_is_refused(hub_home: Path) -> None:
    answer = from_hub(hub_home, "Namespace.from_model('acme/tiny', revision='main', cache_dir=cache)")
    assert answer.startswith("InvalidArgumentError")
    assert "can move" in answer


def test_an_unknown_hub_id_is_one_clear_error(hub_home: Path) -> None:
    answer = from_hub(hub_home, "Namespace.from_model('acme/other', cache_dir=cache)")
    assert answer.startswith("InvalidArgumentError 'acme/other' is neither a directory nor a model that")
    assert "\n" not in answer
