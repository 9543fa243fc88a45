from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_s3.errors import StoreUnavailableError
from kvstore_s3.metrics import Counters
from kvstore_s3.transfer.uploader import Uploader, UploadJob


class Work:
    """Jobs whose encodes and puts wait until they are told to go on, and that remember what ran when."""

    def __init__(self) -> None:
        self.encoding: list[str] = []
        self.putting: list[str] = []
        self.cancelled: list[str] = []
        self.log: list[str] = []
        self._gates: dict[str, asyncio.Event] = {}

    def gate(self, name: str) -> asyncio.Event:
        return self._gates.setdefault(name, asyncio.Event())

    def job(self, name: str, *, reserve: int = 10, size: int | None = None, waits: str = "") -> UploadJob[str, str]:
        """`waits` names the phases ("encode", "put") that wait for their gate."""

        async def encode() -> str:
            await self._phase(f"encode {name}", self.encoding, "encode" in waits)
            return name

        async def put(encoded: str) -> str:
            await self._phase(f"put {encoded}", self.putting, "put" in waits)
            return f"{encoded} stored"

        return UploadJob(encode, reserve, put, None if size is None else lambda _: size)

    async def _phase(self, name: str, active: list[str], waits: bool) -> None:
        active.append(name)
        self.log.append(name)
        try:
            await (self.gate(name).wait() if waits else asyncio.sleep(0))
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        finally:
            active.remove(name)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def work() -> Work:
    return Work()


async def test_results_are_positional_whatever_ends_first(work: Work) -> None:
    uploader = Uploader(3, 100)
    run = asyncio.create_task(uploader.run([work.job(name, waits="put") for name in "abc"]))
    for name in "cab":
        await settle()
        work.gate(f"put {name}").set()
    assert await run == ["a stored", "b stored", "c stored"]
    assert uploader.reserved == 0


async def test_no_jobs_are_no_work() -> None:
    assert await Uploader(1, 1).run([]) == []


async def test_the_next_is_encoded_while_the_last_is_uploaded(work: Work) -> None:
    run = asyncio.create_task(Uploader(1, 100).run([work.job(name, waits="put") for name in "ab"]))
    await settle()
    assert work.putting == ["put a"]
    assert work.log == ["encode a", "encode b", "put a"] or work.log == ["encode a", "put a", "encode b"]
    work.gate("put a").set()
    work.gate("put b").set()
    await run


async def test_no_more_puts_and_encodes_run_than_allowed(work: Work) -> None:
    uploader = Uploader(2, 1000, encoders=3)
    run = asyncio.create_task(uploader.run([work.job(str(n), waits="encode put") for n in range(8)]))
    await settle()
    assert len(work.encoding) == 3
    for n in range(8):
        work.gate(f"encode {n}").set()
        await settle()
        assert len(work.encoding) <= 3
        assert len(work.putting) <= 2
    for n in range(8):
        work.gate(f"put {n}").set()
    await run


async def test_bytes_bound_what_begins_over_all_runs(work: Work) -> None:
    uploader = Uploader(8, 25)
    runs = [asyncio.create_task(uploader.run([work.job(f"{r}{n}", waits="put") for n in range(3)])) for r in "xy"]
    await settle()
    assert uploader.reserved == 20
    assert len(work.putting) == 2
    for name in [f"{r}{n}" for n in range(3) for r in "xy"]:
        work.gate(f"put {name}").set()
    await asyncio.gather(*runs)
    assert uploader.reserved == 0


async def test_a_reservation_shrinks_to_the_real_size_after_the_encode(work: Work) -> None:
    uploader = Uploader(8, 25)
    run = asyncio.create_task(uploader.run([work.job(str(n), size=2, waits="put") for n in range(4)]))
    await settle()
    assert uploader.reserved == 8
    assert len(work.putting) == 4
    for n in range(4):
        work.gate(f"put {n}").set()
    await run


async def test_a_job_that_turned_out_larger_holds_back_the_next(work: Work) -> None:
    uploader = Uploader(8, 25)
    run = asyncio.create_task(uploader.run([work.job("a", size=24, waits="put"), work.job("b")]))
    await settle()
    assert uploader.reserved in (24, 34)
    work.gate("put a").set()
    await run
    assert uploader.reserved == 0


async def test_a_job_larger_than_the_budget_runs_alone(work: Work) -> None:
    uploader = Uploader(8, 25)
    jobs = [work.job("small", waits="put"), work.job("large", reserve=1000, waits="put"), work.job("last")]
    run = asyncio.create_task(uploader.run(jobs))
    await settle()
    assert work.putting == ["put small"]
    work.gate("put small").set()
    await settle()
    assert work.putting == ["put large"]
    assert "encode last" not in work.log
    work.gate("put large").set()
    assert len(await run) == 3


async def test_a_short_run_does_not_wait_for_the_whole_of_a_long_one(work: Work) -> None:
    uploader = Uploader(1, 10)
    long = asyncio.create_task(uploader.run([work.job(f"long {n}") for n in range(50)]))
    await settle()
    before = len([entry for entry in work.log if entry.startswith("put long")])
    await uploader.run([work.job(f"short {n}") for n in range(3)])
    between = len([entry for entry in work.log if entry.startswith("put long")]) - before
    assert between <= 5
    await long


async def test_jobs_are_drawn_as_room_becomes_free(work: Work) -> None:
    drawn = []

    def jobs() -> object:
        for n in range(10):
            drawn.append(n)
            yield work.job(str(n), waits="put")

    run = asyncio.create_task(Uploader(8, 25).run(jobs()))
    await settle()
    assert drawn == [0, 1, 2]
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)


def failing(phase: str) -> UploadJob[str, str]:
    async def fail(*_: object) -> str:
        raise StoreUnavailableError("the network is gone")

    async def encode() -> str:
        return ""

    async def put(_: str) -> str:
        return ""

    return UploadJob(fail if phase == "encode" else encode, 10, fail if phase == "put" else put)


@pytest.mark.parametrize("phase", ["encode", "put"])
async def test_the_first_failure_cancels_the_rest_and_is_raised_as_it_is(work: Work, phase: str) -> None:
    uploader = Uploader(2, 35)
    jobs = [work.job("a", waits="put"), failing(phase), *(work.job(str(n), waits="put") for n in range(9))]
    with pytest.raises(StoreUnavailableError, match="the network is gone"):
        await uploader.run(jobs)
    assert work.encoding == []
    assert work.putting == []
    assert uploader.reserved == 0
    assert await uploader.run([work.job("next")]) == ["next stored"]


async def test_a_failure_leaves_the_other_runs_alone(work: Work) -> None:
    uploader = Uploader(4, 100)
    other = asyncio.create_task(uploader.run([work.job("other", waits="put")]))
    with pytest.raises(StoreUnavailableError):
        await uploader.run([failing("put")])
    work.gate("put other").set()
    assert await other == ["other stored"]


@pytest.mark.parametrize("turns", range(12))
async def test_a_cancelled_run_leaves_nothing_behind(work: Work, turns: int) -> None:
    uploader = Uploader(1, 25, encoders=1)
    run = asyncio.create_task(uploader.run([work.job(str(n), waits="put") for n in range(5)]))
    for _ in range(turns):
        await asyncio.sleep(0)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert work.encoding == []
    assert work.putting == []
    assert uploader.reserved == 0
    assert await uploader.run([work.job("next")]) == ["next stored"]


async def test_a_waiter_that_is_cancelled_does_not_hold_up_those_behind_it(work: Work) -> None:
    uploader = Uploader(8, 25)
    first = asyncio.create_task(uploader.run([work.job("first", reserve=20, waits="put")]))
    await settle()
    waiting = asyncio.create_task(uploader.run([work.job("waiting", reserve=20)]))
    behind = asyncio.create_task(uploader.run([work.job("behind", reserve=5)]))
    await settle()
    assert "encode behind" not in work.log
    waiting.cancel()
    assert await behind == ["behind stored"]
    work.gate("put first").set()
    await first


async def test_what_was_stored_is_counted(work: Work) -> None:
    counters = Counters()

    async def put(encoded: bytes) -> bool:
        return encoded != b"there"

    def job(data: bytes) -> UploadJob[bytes, bool]:
        async def encode() -> bytes:
            return data

        return UploadJob(encode, 100, put, len)

    assert await Uploader(2, 200, counters.add).run([job(b"new"), job(b"there")]) == [True, False]
    assert counters.snapshot() == {"objects_uploaded": 1, "bytes_uploaded": 3}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=6), max_size=4), st.integers(1, 50)
)
def test_reserved_bytes_never_exceed_the_budget_but_for_one_large_job(
    runs: list[list[tuple[int, int]]], budget: int
) -> None:
    async def check() -> None:
        uploader = Uploader(2, budget)
        most = max([budget, *(reserve for run in runs for reserve, _ in run)])

        def step(result: int) -> Callable[..., Awaitable[int]]:
            async def run(*_: object) -> int:
                await asyncio.sleep(0)
                assert uploader.reserved <= most
                return result

            return run

        def job(reserve: int, size: int) -> UploadJob[int, int]:
            return UploadJob(step(min(size, reserve)), reserve, step(reserve), lambda size: size)

        found = await asyncio.gather(*(uploader.run([job(*sizes) for sizes in run]) for run in runs))
        assert found == [[reserve for reserve, _ in run] for run in runs]
        assert uploader.reserved == 0

    asyncio.run(check())
