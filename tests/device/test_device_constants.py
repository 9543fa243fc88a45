"""What calibrations have on a device: put once, within a limit, and gone with their calibration."""

from __future__ import annotations

import gc
import weakref

import numpy as np
from codec.calibrations import make_calibration
from partitions import LAYOUT, draw_kv

from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.codec.device.constants import Constants


class Memory:
    """Arrays that were put, and are there as long as somebody holds them."""

    def __init__(self) -> None:
        self.puts = 0
        self.there: weakref.WeakSet[Memory.Put] = weakref.WeakSet()

    class Put:
        def __init__(self, address: int) -> None:
            self._address = address

        def data_ptr(self) -> int:
            return self._address

    def put(self, values: np.ndarray) -> Memory.Put:
        assert values.flags.c_contiguous
        self.puts += 1
        put = self.Put(self.puts)
        self.there.add(put)
        return put


def calibrate() -> Calibration:
    return make_calibration(LAYOUT, "channel", lambda seed: draw_kv(seed=seed))


def hundred() -> list[np.ndarray | None]:
    return [np.zeros(60, np.uint8), None, np.zeros(40, np.uint8)]


def test_what_was_put_is_not_put_again() -> None:
    memory, calibration = Memory(), calibrate()
    constants = Constants(memory.put, 1000)
    first = constants.find(calibration, "a", hundred)
    assert first is not None
    assert first.addresses == (1, 0, 2)
    assert constants.find(calibration, "a", hundred) is first
    small = constants.find_small(None, "a", lambda: np.zeros(7))
    assert constants.find_small(None, "a", lambda: np.zeros(7)) is small
    assert memory.puts == 3


def test_a_matrix_is_put_row_by_row() -> None:
    matrix = np.zeros((3, 5), np.float16).T
    kept = Constants(Memory().put, 1000).find(calibrate(), "matrix", lambda: [matrix])
    assert kept is not None
    assert kept.nbytes == 30


def test_it_goes_with_its_calibration() -> None:
    memory, calibration = Memory(), calibrate()
    constants = Constants(memory.put, 1000)
    constants.find(calibration, "a", hundred)
    constants.find_small(None, "a", lambda: np.zeros(7))
    assert len(memory.there) == 3
    del calibration
    gc.collect()
    assert len(memory.there) == 1


def test_what_there_is_no_room_for_is_not_put() -> None:
    memory, calibration = Memory(), calibrate()
    constants = Constants(memory.put, 250)
    assert constants.find(calibration, "a", hundred)
    assert constants.find(calibration, "b", hundred)
    assert constants.find(calibration, "c", hundred) is None
    assert len(memory.there) == 4


def test_what_does_not_fit_is_there_for_as_long_as_it_is_used() -> None:
    memory, calibration = Memory(), calibrate()
    constants = Constants(memory.put, 350, 250)
    for key in "ab":
        constants.find(calibration, key, hundred)
    used = constants.find(calibration, "c", hundred)
    assert used is not None
    assert constants.find(calibration, "d", hundred) is None
    assert len(memory.there) == 6
    del used
    assert len(memory.there) == 4
    assert constants.find(calibration, "d", hundred)


def test_another_calibration_takes_the_place_of_the_last_one() -> None:
    memory, calibrations = Memory(), [calibrate(), calibrate()]
    constants = Constants(memory.put, 250)
    for calibration in calibrations:
        for key in "ab":
            assert constants.find(calibration, key, hundred)
    assert len(memory.there) == 4
    assert constants.find(calibrations[1], "a", hundred)
    assert memory.puts == 8


def test_what_is_used_counts_though_it_is_kept_no_more() -> None:
    memory, calibrations = Memory(), [calibrate(), calibrate()]
    constants = Constants(memory.put, 250)
    used = [constants.find(calibrations[0], key, hundred) for key in "ab"]
    assert constants.find(calibrations[1], "a", hundred) is None
    del used
    assert constants.find(calibrations[1], "a", hundred)
    assert len(memory.there) == 2
