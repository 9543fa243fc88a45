"""Lanes, warps and blocks of the kernels share memory only in an order that a GPU guarantees.

The detector (races/detector.cpp) sees each access of the emulated kernels and knows what orders them: sync_warp and
sync_block alone. Neither ballots nor shuffles do, whatever the emulator does in between.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest
from device.emulated import ON_DEVICE, Device, find_compiler
from device.kernel_cases import KINDS, cases_of
from device.watched import Race, WatchedDevice

pytestmark = [
    pytest.mark.skipif(ON_DEVICE, reason="on a GPU it is compute-sanitizer that looks for races"),
    pytest.mark.kernels(),
]

MISTAKES = [
    "lanes read what others wrote",
    "a ballot is taken for a barrier",
    "lanes overwrite what others still read",
    "warps read what others wrote",
    "blocks write the same byte",
    "a copy that is on its way is read",
    "a counter is not always counted atomically",
]
"""As races/mistakes.cu makes them."""


@pytest.fixture(scope="module")
def watched(pytestconfig: pytest.Config) -> WatchedDevice:
    for needed in (find_compiler()[0], "addr2line"):
        if shutil.which(needed) is None:
            pytest.skip(f"the kernels' emulation is built with {needed}, which is not here")
    return WatchedDevice(Path(pytestconfig.cache.mkdir("kernels")))


def is_of_no_consequence(race: Race) -> bool:
    """Words and escapes of a lossless stream run into each other only where they are as long as raw values, which are
    stored then: nobody reads what was overwritten (HeadScratch)."""
    writer = "kvs::(anonymous namespace)::LosslessCodeKernel at lossless_encode.cu"
    return race.kinds == ("write", "write") and all(place.startswith(writer) for place in race.places)


def test_the_watched_kernels_are_not_those_of_another_library_of_this_process(
    watched: WatchedDevice, device: Device
) -> None:
    own, other = (each.library._calls.kvs_count_kernels() for each in (watched, device))
    assert own == other + 1  # that of races/mistakes.cu


@pytest.mark.parametrize("kind", KINDS)
def test_no_kernel_has_a_data_race(watched: WatchedDevice, kind: str) -> None:
    found = []
    for case in cases_of(kind):
        watched.begin()
        case(watched)
        assert watched.count_accesses() > 1000, f"{case.name} was not watched"
        found += [f"{case.name}: {race}" for race in watched.races() if not is_of_no_consequence(race)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("mistake", range(len(MISTAKES)), ids=lambda mistake: MISTAKES[mistake])
def test_a_race_is_found_where_there_is_one_and_only_there(watched: WatchedDevice, mistake: int) -> None:
    memory = watched.put(np.zeros(256, np.uint32))
    for mended in (False, True):
        watched.begin()
        assert watched.make_mistake(mistake, mended, memory.address) == len(MISTAKES)
        assert bool(watched.races()) != mended


def test_what_depends_on_votes_is_found_only_where_they_order_nothing(watched: WatchedDevice) -> None:
    memory = watched.put(np.zeros(256, np.uint32))
    watched.begin(votes_order=True)
    watched.make_mistake(1, False, memory.address)
    assert not watched.races()
    watched.make_mistake(0, False, memory.address)
    assert watched.races()


def test_what_lanes_do_without_a_barrier_shows_in_the_order_of_their_turns(watched: WatchedDevice) -> None:
    memory, found = watched.put(np.zeros(256, np.uint32)), []
    try:
        for seed in (0, 1, 2):
            watched.library.call("kvs_emulator_order", ctypes.c_uint32(seed))
            watched.make_mistake(0, False, memory.address)
            found.append(memory.read())
    finally:
        watched.library.call("kvs_emulator_order", ctypes.c_uint32(0))
    assert len(set(found)) == 3
