"""Bad input gets one line on stderr that says what to do, and the right exit code."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Cli, store_url
from cli.tokenizer_zoo import corpus
from local_server import LocalServer


@pytest.fixture
def doc(tmp_path: Path) -> Path:
    path = tmp_path / "doc.txt"
    path.write_text(corpus()[:2000])
    return path


@pytest.fixture
def other_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny_model, tmp_path / "broken"))


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--profile", "smal"], ["unknown profile 'smal'", "lossless, near-lossless, balanced, small, cachegen"]),
        (["--calibrate"], ["--calibrate: profile 'lossless' uses no calibration", "balanced"]),
        (["--dtype", "int4"], ["unknown dtype 'int4'", "bfloat16"]),
        (["--dtype", "float8_e4m3fn"], ["cannot be computed here", "float16"]),
        (["--chunk-tokens", "100"], ["chunk_tokens", "multiple of 16", "100"]),
        (["--chunk-tokens", "many"], ["'--chunk-tokens'", "valid integer"]),
        (["--prefix-file", "absent.txt"], ["--prefix-file 'absent.txt' cannot be read"]),
        (["--prefix-file", "blank.txt"], ["'blank.txt' is empty"]),
        (["--chat-argument", "x=1"], ["add --chat"]),
        (["--chat", "--chat-argument", "novalue"], ["expected NAME=VALUE"]),
        (["--store", "bogus"], ["'bogus' is not a store URL"]),
        (["--store", "ftp://host/x"], ["unknown scheme 'ftp'"]),
        (["--model", "/no/such/model"], ["no model directory '/no/such/model'"]),
        (["--model", "acme/none-such"], ["'acme/none-such' is neither a directory nor a model"]),
        (["--nonsense"], ["No such option: --nonsense"]),
        (["absent.txt"], ["no such file or directory: 'absent.txt'"]),
        (["*.pdf"], ["no document matches '*.pdf'"]),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_wrong_flag_is_a_usage_error(
    flags: list[str], parts: list[str], cli: Cli, doc: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "blank.txt").write_text("\n")
    ran = cli("warm", doc, "--model", tiny_model, "--store", store_url(tmp_path), *flags)
    ran.fails_with(2, *parts)
    assert ran.out == ""
    assert len(ran.err.strip().splitlines()) == 1


def test_with_json_an_error_is_one_document_too(cli: Cli, doc: Path) -> None:
    for arguments in (["warm", doc, "--model", "/none", "--json"], ["warm", "--json"], ["nonsense", "--json"]):
        ran = cli(*arguments)
        assert ran.json["exit_code"] == ran.code == 2
        assert ran.json["error"] in ran.err


@pytest.mark.parametrize("verb", ["ls", "stat", "check"])
def test_a_missing_store_says_where_to_give_it(verb: str, cli: Cli) -> None:
    cli(verb).fails_with(2, "--store URL", "KVSTORE_S3_STORE", "kvstore-s3.toml")


def test_the_store_may_come_from_the_environment_or_a_file(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvstore-s3.toml").write_text(f'store = "{(tmp_path / "from-file").as_uri()}"')
    assert cli("stat", "--json").json["store"].endswith("from-file")
    monkeypatch.setenv("KVSTORE_S3_STORE", (tmp_path / "from-environment").as_uri())
    assert cli("stat", "--json").json["store"].endswith("from-environment")
    assert cli("stat", "--json", "--store", store_url(tmp_path)).json["store"].endswith("store")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("store = ", ["kvstore-s3.toml is not TOML"]),
        ("stroe = 'x'", ["'stroe' in kvstore-s3.toml is not a setting"]),
        ("max_attempts = 99", ["max_attempts in kvstore-s3.toml", "99"]),
    ],
)
def test_a_wrong_settings_file_is_named(content: str, parts: list[str], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "kvstore-s3.toml").write_text(content)
    cli("ls", "--store", store_url(tmp_path)).fails_with(2, *parts)


def test_a_wrong_setting_in_the_environment_is_named(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_S3_READ_TIMEOUT_S", "soon")
    cli("ls", "--store", store_url(tmp_path)).fails_with(2, "KVSTORE_S3_READ_TIMEOUT_S", "'soon'")


def test_a_single_document_that_cannot_be_used_is_a_usage_error(warm: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    warm("empty.txt").fails_with(2, "empty.txt: is empty")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    warm("latin.txt").fails_with(2, "latin.txt: is not UTF-8")
    (tmp_path / "long.txt").write_text(corpus()[:40_000])
    for flags in ([], ["--chat"]):
        warm("long.txt", *flags).fails_with(2, "long.txt: has ", "the model's context is 4,096", "split it")
    warm("empty.txt", "latin.txt").fails_with(2, "empty.txt: is empty", "1 more")


def test_a_prefix_counts_towards_the_context(warm: Cli, doc: Path, tmp_path: Path) -> None:
    (tmp_path / "long-prefix.txt").write_text(corpus()[:40_000])
    warm(doc, "--prefix-file", "long-prefix.txt").fails_with(2, "the model's context is 4,096")


def test_a_model_without_a_tokenizer_says_what_is_missing(cli: Cli, doc: Path, other_model: Path) -> None:
    for path in other_model.glob("*token*"):
        path.unlink()
    ran = cli("warm", doc, "--model", other_model, "--store", "memory://")
    ran.fails_with(2, "no tokenizer can be loaded from", "tokenizer.json")


def test_a_damaged_tokenizer_is_named(cli: Cli, doc: Path, other_model: Path) -> None:
    (other_model / "tokenizer.json").write_text('{"half": ')
    cli("warm", doc, "--model", other_model, "--store", "memory://").fails_with(2, "tokenizer")


def test_chat_without_a_template_says_so(cli: Cli, doc: Path, other_model: Path) -> None:
    (other_model / "chat_template.jinja").unlink()
    ran = cli("warm", doc, "--model", other_model, "--store", "memory://", "--chat")
    ran.fails_with(2, "has no chat template", "leave --chat out")


def test_an_architecture_that_cannot_be_cut_is_refused_by_name(cli: Cli, doc: Path, other_model: Path) -> None:
    edit_config(other_model, architectures=["MambaForCausalLM"], model_type="mamba")
    cli("warm", doc, "--model", other_model, "--store", "memory://").fails_with(2, "mamba")


def test_damaged_weights_are_named(cli: Cli, doc: Path, other_model: Path) -> None:
    weights = other_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    ran = cli("warm", doc, "--model", other_model, "--store", "memory://")
    ran.fails_with(2, "cannot be loaded")


def test_a_directory_that_cannot_be_a_store_is_refused(cli: Cli, doc: Path) -> None:
    cli("ls", "--store", doc.as_uri()).fails_with(3, "directory was expected")


@pytest.fixture
def s3(moto: LocalServer, monkeypatch: pytest.MonkeyPatch) -> LocalServer:
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KVSTORE_S3_MAX_ATTEMPTS", "1")
    return moto


def test_the_same_verbs_work_on_s3(cli: Cli, doc: Path, tiny_model: Path, s3: LocalServer) -> None:
    store = ("--store", "s3://kvstore-tests/cli", "--endpoint-url", s3.endpoint)
    report = cli("warm", doc, "--model", tiny_model, *store, "--json").json
    assert report["chunks_new"] == report["chunks"] > 0
    assert cli("warm", doc, "--model", tiny_model, *store, "--json").json["chunks_new"] == 0
    assert cli("check", *store, "--json").json["objects"] == report["chunks"]
    assert cli("stat", *store, "--json").json["bytes"] == report["bytes"]


@pytest.mark.parametrize("verb", ["ls", "check", "warm"])
def test_a_bucket_that_is_not_there_is_named(verb: str, cli: Cli, doc: Path, tiny_model: Path, s3: LocalServer) -> None:
    arguments = [doc, "--model", tiny_model] if verb == "warm" else []
    ran = cli(verb, *arguments, "--store", "s3://no-such-bucket", "--endpoint-url", s3.endpoint)
    ran.fails_with(3, "no-such-bucket")


@pytest.mark.parametrize("verb", ["stat", "warm"])
def test_an_endpoint_where_nobody_listens_is_named(
    verb: str, cli: Cli, doc: Path, tiny_model: Path, s3: LocalServer
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        arguments = [doc, "--model", tiny_model] if verb == "warm" else []
        ran = cli(verb, *arguments, "--store", "s3://kvstore-tests", "--endpoint-url", endpoint)
        ran.fails_with(3, endpoint)


def test_missing_credentials_are_named(cli: Cli, s3: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in s3.environment():
        if "KEY" in name:
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    cli("ls", "--store", "s3://kvstore-tests", "--endpoint-url", s3.endpoint).fails_with(3, "credentials")


@pytest.mark.server
def test_wrong_credentials_are_refused(cli: Cli, minio: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in minio.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong" * 6)
    cli("ls", "--store", "s3://kvstore-tests", "--endpoint-url", minio.endpoint).fails_with(3, "secret key")
