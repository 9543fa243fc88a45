"""What kv_connector_extra_config may hold."""

from __future__ import annotations

import pytest

from kvstore_s3.config import load_settings
from kvstore_s3.connectors.vllm.options import Options
from kvstore_s3.errors import InvalidArgumentError


def parse(**extra: object) -> Options:
    return Options.parse(extra, load_settings())


def test_a_store_is_enough():
    assert parse(store="s3://bucket/prefix").chunk_tokens == 256


def test_the_store_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVSTORE_S3_STORE", "file:///somewhere")
    monkeypatch.setenv("KVSTORE_S3_CHUNK_TOKENS", "128")
    assert parse() == parse(store="file:///somewhere", chunk_tokens=128)


def test_no_store_is_refused_with_what_to_write():
    with pytest.raises(InvalidArgumentError, match="KVSTORE_S3_STORE"):
        parse()


def test_an_unknown_key_is_refused_by_name():
    with pytest.raises(InvalidArgumentError, match=r"unknown key 'stroe'; known are .*store"):
        parse(stroe="file:///x")


@pytest.mark.parametrize("name", ["aws_secret_access_key", "access_key_id", "session_token", "password", "apikey"])
def test_credentials_are_refused_and_not_repeated(name: str):
    with pytest.raises(InvalidArgumentError, match="default AWS chain") as refusal:
        parse(store="s3://bucket", **{name: "hunter2"})
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("url", ["s3://user:hunter2@bucket/prefix", "s3://bucket/prefix?X-Amz-Signature=hunter2"])
def test_credentials_in_the_url_are_refused_and_not_repeated(url: str):
    with pytest.raises(InvalidArgumentError, match="default") as refusal:
        parse(store=url)
    assert "hunter2" not in str(refusal.value)


def test_a_url_that_cannot_be_read_is_refused():
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        parse(store="s3://[bucket/prefix")


def test_the_profile_is_the_settings_unless_it_is_given(monkeypatch: pytest.MonkeyPatch):
    assert parse(store="file:///x").profile == "lossless"
    monkeypatch.setenv("KVSTORE_S3_PROFILE", "balanced")
    assert parse(store="file:///x").profile == "balanced"
    assert parse(store="file:///x", profile="small").profile == "small"


@pytest.mark.parametrize("profile", ["smal", "", None, 2])
def test_an_unknown_profile_is_refused_with_those_there_are(profile: object):
    with pytest.raises(InvalidArgumentError, match=r"unknown profile .* lossless, near-lossless, balanced, small"):
        parse(store="file:///x", profile=profile)


def test_what_may_be_left_open_may_be_none():
    options = parse(store="file:///x", prefill_tokens_per_s=None, first_token_deadline_s=2)
    assert (options.prefill_tokens_per_s, options.first_token_deadline_s) == (None, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"load_deadline_s": 0},
        {"load_deadline_s": None},
        {"flush_s": float("inf")},
        {"save_memory_bytes": 1.5},
        {"chunk_tokens": True},
        {"load_mode": "layerwise"},
        {"admission": "never"},
        {"save_at": 3},
        {"save_at": True},
        {"prefill_tokens_per_s": -1},
        {"prefill_tokens_per_s": 1e-320},
        {"flush_s": 1e300},
    ],
)
def test_a_number_that_cannot_be_meant_is_refused(wrong: dict[str, object]):
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        parse(store="file:///x", **wrong)
