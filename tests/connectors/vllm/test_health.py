"""One line when the store fails, one when it is back, and no request that finds out."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future

import pytest

from kvstore_s3.connectors.vllm import health
from kvstore_s3.connectors.vllm.health import StoreHealth, result_or_none
from kvstore_s3.errors import StoreUnavailableError


class Probe:
    """Fails until `up` is set."""

    def __init__(self) -> None:
        self.up = False
        self.calls = 0
        self.called = asyncio.Event()

    async def __call__(self) -> None:
        self.calls += 1
        self.called.set()
        if not self.up:
            raise StoreUnavailableError("connection refused")


async def test_many_failures_give_one_line(caplog: pytest.LogCaptureFixture):
    store = StoreHealth("s3://bucket", Probe())
    await store.check()
    for _ in range(5):
        store.report(StoreUnavailableError("connection refused"))
    assert not store.available
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "s3://bucket" in caplog.text


async def test_a_store_that_answers_again_is_used_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(health, "_FIRST_RETRY_S", 0.001)
    probe = Probe()
    store = StoreHealth("s3://bucket", probe)
    with caplog.at_level(logging.INFO, logger="vllm.kvstore_s3"):
        await store.check()
        while probe.calls < 3:
            probe.called.clear()
            await probe.called.wait()
        assert not store.available
        probe.up = True
        await store._healing
    assert store.available
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_the_time_between_attempts_grows_to_a_minute():
    delays = health._retry_delays()
    assert [next(delays) for _ in range(7)] == [2, 4, 8, 16, 32, 60, 60]


def test_an_unforeseen_failure_is_logged_and_no_result(caplog: pytest.LogCaptureFixture):
    future: Future[int] = Future()
    future.set_exception(RuntimeError("a defect"))
    assert result_or_none(future) is None
    assert "a defect" in caplog.text
