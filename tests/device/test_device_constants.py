"""What calibrations have on a device: put once, within a limit, and gone with their calibration."""

from __future__ import annotations

import gc
import weakref

import numpy as np
from codec.calibrations import make_calibration
from partitions import LAYOUT, draw_kv

from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.codec.device.constants import Constants, Hold


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


def hundred(hold: Hold) -> int:
    return hold(np.zeros(100, np.uint8))


def test_what_was_put_is_not_put_again() -> None:
    memory, calibration = Memory(), calibrate()
    constants = Constants(memory.put)
    first = constants.find(calibration, "a", hundred)
    assert constants.find(calibration, "a", hundred) is first
    assert constants.find(calibration, "b", hundred).value == 2
    assert constants.find(None, "a", hundred).value == 3
    assert constants.find(None, "a", hundred).value == 3


def test_a_matrix_is_put_row_by_row() -> None:
    matrix = np.zeros((3, 5), np.float16).T
    assert Constants(Memory().put).find(None, "matrix", lambda hold: hold(matrix)).nbytes == 30


def test_it_goes_with_its_calibration() -> None:
    memory, calibration = Memory(), calibrate()
    constants = Constants(memory.put)
    constants.find(calibration, "a", hundred)
    constants.find(None, "a", hundred)
    assert len(memory.there) == 2
    del calibration
    gc.collect()
    assert len(memory.there) == 1


def test_what_does_not_fit_is_there_for_as_long_as_it_is_used() -> None:
    memory, calibration = Memory(), calibrate()
    constants = Constants(memory.put, 250)
    for key in "ab":
        constants.find(calibration, key, hundred)
    used = constants.find(calibration, "c", hundred)
    assert len(memory.there) == 3
    del used
    assert len(memory.there) == 2
    assert constants.find(calibration, "c", hundred).value == 4
    assert constants.find(calibration, "a", hundred).value == 1


def test_another_calibration_takes_the_place_of_the_last_one() -> None:
    memory, calibrations = Memory(), [calibrate(), calibrate()]
    constants = Constants(memory.put, 250)
    for calibration in calibrations:
        for key in "ab":
            constants.find(calibration, key, hundred)
    assert len(memory.there) == 2
    assert constants.find(calibrations[1], "a", hundred).value == 3
