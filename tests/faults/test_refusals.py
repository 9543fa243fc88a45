"""The fault matrix, refusals: said clearly at the start, a miss at run time, and over when the cause is."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from fault_proxy import Action
from faults.actions import ACCESS_DENIED, CLOCK_SKEW, EXPIRED_TOKEN, NO_SUCH_BUCKET
from faults.scene import NAMESPACE, PATIENT, TOKENS, Scene, serve
from objectstore.scripted_server import Request, answer, running

from kvstore_s3 import KVStore
from kvstore_s3.errors import StoreRefusedError, StoreUnavailableError

pytestmark = pytest.mark.usefixtures("quiet", "no_leaks")

REFUSALS = pytest.mark.parametrize(
    ("fault", "advice"),
    [
        (EXPIRED_TOKEN, "token has expired; renew"),
        (CLOCK_SKEW, "set the clock"),
        (ACCESS_DENIED, "lack permission"),
        (NO_SUCH_BUCKET, "the bucket does not exist; create it"),
    ],
    ids=["expired token", "clock skew", "403", "no such bucket"],
)


@REFUSALS
async def test_a_refusal_at_the_start_is_an_error_that_says_what_to_do(
    scene: Scene, fault: Action, advice: str
) -> None:
    with scene.proxy.fault("", fault), pytest.raises(StoreRefusedError, match=advice):
        async with scene.open(**PATIENT):
            pass


@REFUSALS
async def test_a_refusal_at_run_time_is_quick_and_over_when_its_cause_is(
    filled: Scene, fault: Action, advice: str
) -> None:
    async with filled.open(breaker_pause_s=0.1, **PATIENT) as store:
        await filled.assert_served_in_full(store)
        with filled.proxy.fault("", fault) as rule:
            for _ in range(5):
                served = await serve(store, filled.kv)
                assert served.tokens == 0
                assert served.seconds < 10, "asked again until the deadline"
            assert rule.met <= 40, "a store that refuses is asked again and again"
            assert advice in str(served.error) or (fault is NO_SUCH_BUCKET and served.error is None)
        for _ in range(300):
            if (await serve(store, filled.kv)).tokens == len(TOKENS):
                return
            await asyncio.sleep(0.1)
        raise AssertionError("the cause is gone, and the store is not used")


async def test_a_missing_bucket_is_an_error_at_the_start(scene: Scene) -> None:
    with pytest.raises(StoreRefusedError, match="the bucket does not exist; create it"):
        async with KVStore.open("s3://no-such-bucket/prefix", NAMESPACE, scene.settings(**PATIENT)):
            pass


async def test_a_wrong_secret_is_an_error_at_the_start(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    if scene.server.name == "moto":
        pytest.skip("moto does not look at signatures")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not this one")
    with pytest.raises(StoreRefusedError, match="secret key does not belong"):
        async with scene.open(**PATIENT):
            pass


async def test_a_wrong_endpoint_is_an_error_at_the_start(scene: Scene) -> None:
    scene.proxy.refuse()
    with pytest.raises(StoreUnavailableError, match="cannot be reached; is endpoint_url right"):
        async with scene.open(**PATIENT):
            pass


@pytest.fixture
async def given_out(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Request]]:
    """The requests to a service that gives out credentials for an hour, others each time, the only ones there are."""

    def give(request: Request) -> bytes:
        expiration = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
        key, secret, token = scene.server.access_key, scene.server.secret_key, secrets.token_hex(8)
        document = {"AccessKeyId": key, "SecretAccessKey": secret, "Token": token, "Expiration": expiration}
        return answer("200 OK", json.dumps(document).encode(), "Content-Type: application/json")

    if scene.server.name != "moto":
        pytest.skip("only moto takes any session token")
    async with running(give) as service:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{service.endpoint}/credentials")
        yield service.requests


async def test_a_token_that_expired_early_is_renewed_once(filled: Scene, given_out: list[Request]) -> None:
    async with filled.open(**PATIENT) as store:
        await filled.assert_served_in_full(store)
        before = len(given_out)
        with filled.proxy.fault("GetObject", EXPIRED_TOKEN, times=1):
            await filled.assert_served_in_full(store)
        assert before < len(given_out) <= before + 2


async def test_a_token_that_stays_expired_is_not_renewed_again_and_again(
    filled: Scene, given_out: list[Request]
) -> None:
    async with filled.open(**PATIENT) as store:
        await filled.assert_served_in_full(store)
        before = len(given_out)
        with filled.proxy.fault("", EXPIRED_TOKEN) as rule:
            for _ in range(10):
                served = await serve(store, filled.kv)
                assert served.tokens == 0
            assert "renew the credentials" in str(served.error)
        assert rule.met <= 40
        assert len(given_out) <= before + 12
