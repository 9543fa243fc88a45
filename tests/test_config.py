"""Settings: where they come from, and what is said about a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore_s3.config import Settings, load_settings
from kvstore_s3.errors import InvalidArgumentError


@pytest.fixture(autouse=True)
def clean_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"KVSTORE_S3_{name.upper()}", raising=False)
    return tmp_path


def test_arguments_beat_the_environment_beats_the_file_beats_the_defaults(
    clean_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (clean_directory / "kvstore-s3.toml").write_text('store = "memory://toml"\nlayer_group = 7\nmax_attempts = 9\n')
    monkeypatch.setenv("KVSTORE_S3_STORE", "memory://environment")
    monkeypatch.setenv("KVSTORE_S3_LAYER_GROUP", "6")
    settings = load_settings(store="memory://argument", region=None)
    assert (settings.store, settings.layer_group, settings.max_attempts) == ("memory://argument", 6, 9)
    assert settings.chunk_tokens == 256


def test_an_empty_variable_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_S3_ENDPOINT_URL", "")
    assert load_settings().endpoint_url is None


def test_the_cache_directory_follows_the_desktop_convention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert load_settings().cache_dir == Path("/somewhere/kvstore-s3")


@pytest.mark.parametrize("given", [{"chunk_tokens": 100}, {"max_attempts": 0}, {"multipart_bytes": 1}])
def test_a_wrong_argument_is_named(given: dict[str, int]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(given))):
        load_settings(**given)


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_S3_READ_TIMEOUT_S", "soon")
    with pytest.raises(InvalidArgumentError, match=r"KVSTORE_S3_READ_TIMEOUT_S.*'soon'"):
        load_settings()


def test_a_misspelt_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_S3_ENDPOINT", "http://127.0.0.1:9000")
    with pytest.raises(InvalidArgumentError, match="KVSTORE_S3_ENDPOINT in the environment is not a setting"):
        load_settings()


@pytest.mark.parametrize(("text", "says"), [("store = ", "not TOML"), ("colour = 1", "'colour' in kvstore-s3.toml")])
def test_a_wrong_file_is_named(clean_directory: Path, text: str, says: str) -> None:
    (clean_directory / "kvstore-s3.toml").write_text(text)
    with pytest.raises(InvalidArgumentError, match=says):
        load_settings()


def test_every_setting_is_documented() -> None:
    text = (Path(__file__).resolve().parent.parent / "kvstore_s3" / "config.py").read_text()
    for name in Settings.model_fields:
        _, _, after = text.partition(f"\n    {name}: ")
        assert after.partition("\n")[2].startswith('    """'), name


def test_the_directory_of_the_nvme_tier_is_the_same_from_every_working_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_settings(nvme_tier_dir="~/kv").nvme_tier_dir == Path("/home/somebody/kv")
    monkeypatch.setenv("KVSTORE_S3_NVME_TIER_DIR", "near/kv")
    with pytest.raises(InvalidArgumentError, match=r"KVSTORE_S3_NVME_TIER_DIR.*absolute path.*near/kv"):
        load_settings()


@pytest.mark.parametrize(
    "name", ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_9000_TCP", "PORT_9000_TCP_ADDR"]
)
def test_what_kubernetes_says_of_a_service_of_the_same_name_is_no_setting(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(f"KVSTORE_S3_{name}", "tcp://10.0.0.1:9000")
    assert load_settings() == Settings()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(InvalidArgumentError, match="set HOME, or KVSTORE_S3_CACHE_DIR"):
        load_settings()
    monkeypatch.setenv("KVSTORE_S3_CACHE_DIR", "/somewhere")
    assert load_settings().cache_dir == Path("/somewhere")
