"""One line when the store fails, one when it is back, and no request that finds out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from concurrent.futures import Future
from time import monotonic

import pytest

from kvstore_s3.config import Settings
from kvstore_s3.connectors.vllm.health import StoreHealth, result_or_none, speak_through_engine
from kvstore_s3.errors import StoreUnavailableError
from kvstore_s3.objectstore.guarded import GuardedStore
from kvstore_s3.objectstore.memory import MemoryStore

REFUSED = StoreUnavailableError("connection refused")


class Faulty(MemoryStore):
    """Fails its probes until `up` is set; `gate` holds them back."""

    def __init__(self, *, up: bool = False) -> None:
        super().__init__("faulty")
        self.up = up
        self.probes = 0
        self.probed = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def probe(self) -> None:
        self.probes += 1
        self.probed.set()
        await self.gate.wait()
        if not self.up:
            raise REFUSED

    async def fail(self, probes: int) -> None:
        """Wait until so many probes were made."""
        while self.probes < probes:
            self.probed.clear()
            await self.probed.wait()


class Scene:
    """A store behind its guard, and what an engine's process thinks of it."""

    def __init__(self, *, up: bool = False) -> None:
        settings = Settings(breaker_pause_s=0.001)
        self.store = Faulty(up=up)
        self.guard = GuardedStore(self.store, settings)
        self.health = StoreHealth(self.guard, settings)

    async def end(self) -> None:
        assert self.health._outage is not None
        await self.health._outage


async def test_many_failures_give_one_line(caplog: pytest.LogCaptureFixture):
    scene = Scene()
    await scene.health.check()
    for _ in range(5):
        scene.health.report(REFUSED)
    await asyncio.sleep(0)
    assert not scene.health.available
    assert levels(caplog) == ["WARNING"]
    assert "computed without the KV store memory://faulty" in caplog.text
    await scene.guard.close()


async def test_a_store_that_answers_again_is_used_again(caplog: pytest.LogCaptureFixture):
    scene = Scene()
    with caplog.at_level(logging.INFO, logger="vllm.kvstore_s3"):
        await scene.health.check()
        await scene.store.fail(3)
        assert not scene.health.available
        scene.store.up = True
        await scene.end()
    assert scene.health.available
    assert levels(caplog) == ["WARNING", "INFO"]
    await scene.guard.close()


async def test_a_doubted_store_is_not_used_until_it_was_asked():
    scene = Scene(up=True)
    scene.store.gate.clear()
    scene.health.report(REFUSED)
    assert not scene.health.available
    assert scene.guard.available, "the guard has seen no failure"
    scene.store.gate.set()
    await scene.end()
    assert scene.health.available


async def test_a_store_that_fails_now_and_then_is_told_of_once_a_minute(caplog: pytest.LogCaptureFixture):
    scene = Scene(up=True)
    with caplog.at_level(logging.INFO, logger="vllm.kvstore_s3"):
        for _ in range(4):
            scene.health.report(REFUSED)
            await scene.end()
    assert levels(caplog) == ["WARNING", "INFO"]


async def test_an_outage_that_follows_soon_is_told_of_when_it_lasts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kvstore_s3.connectors.vllm.health._QUIET_S", 0.3)
    scene = Scene(up=True)
    scene.health.report(REFUSED)
    await scene.end()
    caplog.clear()
    quiet_until = scene.health._quiet_until
    scene.store.up = False
    told_at: list[float] = []
    tell, told = scene.health._tell, asyncio.Event()

    def note(error: Exception) -> bool:
        if tell(error):
            told_at.append(monotonic())
            told.set()
        return bool(told_at)

    monkeypatch.setattr(scene.health, "_tell", note)
    scene.health.report(REFUSED)
    await asyncio.wait_for(told.wait(), 60)
    assert told_at[0] >= quiet_until, "one was told of just before"
    assert levels(caplog) == ["WARNING"]
    scene.store.up = True
    await scene.end()
    await scene.guard.close()


async def test_a_store_that_is_closed_in_an_outage_is_not_said_to_be_back(caplog: pytest.LogCaptureFixture):
    scene = Scene()
    with caplog.at_level(logging.INFO, logger="vllm.kvstore_s3"):
        await scene.health.check()
        await asyncio.sleep(0)
        await scene.guard.close()
        await scene.end()
    assert levels(caplog) == ["WARNING"]


async def test_a_store_without_a_guard_is_given_one():
    store = Faulty()
    health = StoreHealth(store, Settings(breaker_pause_s=0.001))
    await health.check()
    assert not health.available
    store.up = True
    assert health._outage is not None
    await health._outage
    assert health.available


def test_an_unforeseen_failure_is_logged_and_no_result(caplog: pytest.LogCaptureFixture):
    future: Future[int] = Future()
    future.set_exception(RuntimeError("a defect"))
    assert result_or_none(future) is None
    assert "a defect" in caplog.text


class Kept(logging.Handler):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def engine_log() -> Iterator[Kept]:
    """The handler of an engine's logger; all loggers are as before afterwards."""
    names = ("vllm", "kvstore_s3", "kvstore_s3.outages")
    loggers = [logging.getLogger(name) for name in names]
    before = [(one, list(one.handlers), one.propagate, one.level) for one in loggers]
    kept = Kept()
    loggers[0].handlers, loggers[0].propagate = [kept], False
    loggers[0].setLevel(logging.INFO)
    loggers[1].handlers = []
    yield kept
    for one, handlers, propagate, level in before:
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


def test_the_packages_lines_appear_as_the_engines_do_and_an_outage_is_told_once(engine_log: Kept):
    speak_through_engine()
    speak_through_engine()
    logging.getLogger("kvstore_s3").warning("a tier switched itself off")
    logging.getLogger("kvstore_s3.outages").warning("the store is left alone")
    assert engine_log.lines == ["a tier switched itself off"]


def test_a_logger_that_the_user_has_set_up_is_left_to_them(engine_log: Kept):
    own = Kept()
    logging.getLogger("kvstore_s3").addHandler(own)
    speak_through_engine()
    logging.getLogger("kvstore_s3").warning("a tier switched itself off")
    assert own.lines == ["a tier switched itself off"]
    assert engine_log.lines == []


def levels(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.levelname for record in caplog.records if record.name == "vllm.kvstore_s3"]
