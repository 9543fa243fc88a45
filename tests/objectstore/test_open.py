"""URLs of stores: what is accepted, and what is refused in words that help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvstore_s3.config import Settings
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.objectstore.open import open_store


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("file:///some/dir", "file:///some/dir"),
        ("file:///some/dir/", "file:///some/dir"),
        ("file://localhost/some/dir", "file:///some/dir"),
        ("file:///some/a%20dir%3F", "file:///some/a%20dir%3F"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://my.bucket-1/Some/prefix_1/", "s3://my.bucket-1/Some/prefix_1"),
        ("memory://", "memory://"),
        ("memory://Name-1", "memory://Name-1"),
    ],
)
async def test_urls_are_accepted(url: str, normal: str) -> None:
    store = open_store(url, Settings())
    assert store.url == normal
    await store.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "not a store URL"),
        ("/some/dir", "write file:///some/dir"),
        ("some/dir", "write file:///absolute/dir"),
        ("https://bucket.example.org/x", "unknown scheme 'https'"),
        ("file://", "no directory"),
        ("file:///", "no directory"),
        ("file://some/dir", "relative"),
        ("file://./some/dir", "relative"),
        ("file:///some/../dir", r"contains '\.\.'"),
        ("file:///some/%2E%2E/dir", r"contains '\.\.'"),
        ("file:///some/%00", "NUL"),
        ("file:///some/dir?x", "no '\\?' or '#'"),
        ("s3://", "no bucket"),
        ("s3:///prefix", "no bucket"),
        ("s3://ab", "not a bucket name"),
        ("s3://Bucket/prefix", "not a bucket name"),
        ("s3://127.0.0.1:9000/bucket", "endpoint_url"),
        ("s3://bucket//prefix", "part of the prefix"),
        ("s3://bucket/a/../b", "part of the prefix"),
        ("s3://bucket/.hidden", "part of the prefix"),
        ("s3://bucket/a b", "part of the prefix"),
        ("s3://bucket/a%2Fb", "part of the prefix"),
        ("s3://bucket/" + "a" * 501, "500"),
        ("s3://bucket/prefix?region=x", "no '\\?' or '#'"),
        ("s3://bucket/prefix#x", "no '\\?' or '#'"),
        ("memory://a/b", "memory://NAME"),
        ("s3://[bad/prefix", "cannot be parsed"),
    ],
)
def test_urls_are_refused_with_advice(url: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        open_store(url, Settings())


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidArgumentError, match="credentials") as caught:
        open_store("s3://AKIAEXAMPLE:s3cr3t@bucket/prefix", Settings())
    assert "s3cr3t" not in str(caught.value)
    with pytest.raises(InvalidArgumentError, match="credentials") as caught:
        open_store("s3://bucket", Settings(endpoint_url="http://AKIAEXAMPLE:s3cr3t@localhost:9000"))
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint", ["localhost:9000", "ftp://localhost", "http://", "http://a:b", "http://[", "http://h:9/?x=y"]
)
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(InvalidArgumentError, match="endpoint_url"):
        open_store("s3://bucket", Settings(endpoint_url=endpoint))


def test_a_file_store_does_not_import_the_s3_client(tmp_path: Path) -> None:
    script = (
        "import sys; from kvstore_s3.config import Settings; from kvstore_s3.objectstore.open import open_store; "
        f"open_store({tmp_path.as_uri()!r}, Settings()); "
        "sys.exit(any(name in sys.modules for name in ('aiobotocore', 'botocore', 'aiohttp', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
