"""Turns: a bound for all loads together, and none of them without any."""

from __future__ import annotations

import asyncio
import random

import pytest

from kvstore_s3.transfer.turns import LoadTurns, Turns


class Work:
    """Takes turns of a load until it is told to end them."""

    def __init__(self, load: LoadTurns) -> None:
        self._load = load
        self._ended = asyncio.Event()
        self.begun = False
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self._load:
            self.begun = True
            await self._ended.wait()

    async def end(self) -> None:
        self._ended.set()
        await self.task


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def begin(load: LoadTurns, count: int) -> list[Work]:
    work = [Work(load) for _ in range(count)]
    await settle()
    return work


def count_begun(work: list[Work]) -> int:
    return sum(one.begun for one in work)


async def end_all(*groups: list[Work]) -> None:
    for work in groups:
        for one in work:
            await one.end()


async def test_one_load_takes_all_turns_and_no_more() -> None:
    turns = Turns(3)
    work = await begin(turns.of_load(), 5)
    assert [one.begun for one in work] == [True, True, True, False, False]
    await work[1].end()
    await settle()
    assert [one.begun for one in work] == [True, True, True, True, False]
    await end_all(work)
    assert turns.taken == 0


async def test_a_load_gets_a_turn_however_many_others_have() -> None:
    turns = Turns(2)
    long = await begin(turns.of_load(), 9)
    late = await begin(turns.of_load(), 4)
    assert (count_begun(long), count_begun(late)) == (2, 1)
    await late[0].end()
    await settle()
    assert count_begun(late) == 2  # its next one, beside those of the other
    await end_all(late, long)


async def test_free_turns_go_to_waiting_loads_in_turn() -> None:
    turns = Turns(4)
    long = await begin(turns.of_load(), 40)
    late = await begin(turns.of_load(), 4)
    for one in long[:4]:
        await one.end()
        await settle()
    assert (count_begun(long) - 4, count_begun(late) - 1) == (2, 1)  # the load's own one was beside the four
    await end_all(long, late)


async def test_who_is_cancelled_while_waiting_takes_nothing() -> None:
    turns = Turns(1)
    load = turns.of_load()
    first, second, third = await begin(load, 3)
    second.task.cancel()
    await settle()
    await first.end()
    await settle()
    assert third.begun
    assert not second.begun
    await third.end()
    assert turns.taken == 0


async def test_a_turn_granted_to_who_is_cancelled_in_the_same_step_goes_on() -> None:
    turns = Turns(1)
    load = turns.of_load()
    first, second, third = await begin(load, 3)
    first._ended.set()
    await asyncio.sleep(0)  # its turn is the second's now, who has not run yet
    second.task.cancel()
    await settle()
    assert third.begun
    await third.end()
    with pytest.raises(asyncio.CancelledError):
        await second.task
    assert turns.taken == 0


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_happens_the_bound_holds_and_all_is_given_back(seed: int) -> None:
    chance, turns = random.Random(seed), Turns(3)
    loads = [turns.of_load() for _ in range(4)]
    work: list[tuple[int, Work]] = []
    for _ in range(200):
        act = chance.random()
        if act < 0.5 or not work:
            number = chance.randrange(4)
            work.append((number, Work(loads[number])))
        else:
            _, one = work.pop(chance.randrange(len(work)))
            if act < 0.8 and one.begun:
                await one.end()
            else:
                one.task.cancel()
        for _ in range(chance.randrange(3)):
            await asyncio.sleep(0)
        assert turns.taken <= 3 + 3  # one beside them for each load but the last
    await settle()
    asked = {number for number, one in work if not one.task.done()}
    assert all(any(one.begun for number, one in work if number == load and not one.task.done()) for load in asked)
    for _, one in work:
        one.task.cancel()
    await settle()
    assert turns.taken == 0
