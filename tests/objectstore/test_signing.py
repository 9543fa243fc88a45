"""Our signatures are those of botocore's full signer, byte for byte."""

from __future__ import annotations

import datetime
from unittest.mock import patch
from urllib.parse import parse_qsl

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.compat import urlsplit
from botocore.config import Config
from botocore.credentials import ReadOnlyCredentials
from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.objectstore.signing import Signer, quote_key, quote_query

NOW = 1_790_000_000.0
HOST = "127.0.0.1:9000"


def parse(request: bytes) -> tuple[str, str, dict[str, str]]:
    first, *lines = request.decode().removesuffix("\r\n\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    return method, target, dict(line.split(": ", 1) for line in lines)


def botocore_authorization(method: str, target: str, headers: dict[str, str], credentials: ReadOnlyCredentials) -> str:
    request = AWSRequest(method=method, url=f"http://{HOST}{target}", headers=headers)
    request.context["client_config"] = Config(s3={"payload_signing_enabled": False})
    moment = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
    with patch("botocore.auth.get_current_datetime", return_value=moment):
        S3SigV4Auth(credentials, "s3", "eu-west-1").add_auth(request)
    assert urlsplit(request.url).path == target.partition("?")[0]
    return str(request.headers["Authorization"])


@given(
    method=st.sampled_from(["GET", "HEAD", "PUT"]),
    key=st.from_regex(r"[A-Za-z0-9_=+@!-][A-Za-z0-9._=+@!/-]{0,40}", fullmatch=True),
    query=st.dictionaries(
        st.sampled_from(["partNumber", "uploadId", "a"]), st.text(st.characters(codec="ascii"), max_size=9)
    ),
    headers=st.dictionaries(
        st.sampled_from(["range", "if-match", "if-none-match", "x-amz-checksum-crc32c", "x-amz-meta-kvs-index"]),
        st.from_regex(r"[!-~]+( [!-~]+)*", fullmatch=True),
    ),
    token=st.sampled_from([None, "token+/="]),
)
def test_the_signature_is_that_of_botocore(
    method: str, key: str, query: dict[str, str], headers: dict[str, str], token: str | None
) -> None:
    credentials = ReadOnlyCredentials("AKIAEXAMPLE", "s3cr3t", token)
    target = f"/bucket/{quote_key(key)}" + (f"?{quote_query(query)}" if query else "")
    signer = Signer(credentials, region="eu-west-1", service="s3", authority=HOST)
    sent = parse(signer.sign(method, target, headers, now=NOW))
    assert sent[:2] == (method, target)
    assert {name: sent[2][name] for name in headers} == headers
    assert dict(parse_qsl(target.partition("?")[2], keep_blank_values=True)) == query
    assert sent[2]["authorization"] == botocore_authorization(method, target, headers, credentials)


def test_the_key_of_a_day_is_not_used_on_the_next() -> None:
    credentials = ReadOnlyCredentials("AKIAEXAMPLE", "s3cr3t", None)
    used = Signer(credentials, region="eu-west-1", service="s3", authority=HOST)
    used.sign("GET", "/bucket/k", {}, now=NOW)
    fresh = Signer(credentials, region="eu-west-1", service="s3", authority=HOST)
    assert used.sign("GET", "/bucket/k", {}, now=NOW + 86400) == fresh.sign("GET", "/bucket/k", {}, now=NOW + 86400)


def test_length_and_expect_are_sent_and_not_signed() -> None:
    credentials = ReadOnlyCredentials("AKIAEXAMPLE", "s3cr3t", None)
    signer = Signer(credentials, region="eu-west-1", service="s3", authority=HOST)
    bare = parse(signer.sign("PUT", "/bucket/k", {}, now=NOW))[2]
    full = parse(signer.sign("PUT", "/bucket/k", {"content-length": "5", "expect": "100-continue"}, now=NOW))[2]
    assert (full["content-length"], full["expect"]) == ("5", "100-continue")
    assert full["authorization"] == bare["authorization"]


@pytest.mark.parametrize("moment", [0.0, NOW, NOW + 0.9])
def test_the_date_is_that_of_the_request(moment: float) -> None:
    credentials = ReadOnlyCredentials("AKIAEXAMPLE", "s3cr3t", None)
    signer = Signer(credentials, region="eu-west-1", service="s3", authority=HOST)
    found = parse(signer.sign("GET", "/bucket/k", {}, now=moment))[2]["x-amz-date"]
    assert found == datetime.datetime.fromtimestamp(int(moment), datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
