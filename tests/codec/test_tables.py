from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import reference_calibration
from codec.streams import draw_values, encode, expected_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_s3 import _native
from kvstore_s3.codec.frequencies import symmetric_frequencies, ternary_thresholds
from kvstore_s3.codec.tables import TableSet, classes_of, fit_tables, uncalibrated_tables
from kvstore_s3.errors import InvalidArgumentError

TABLES = uncalibrated_tables()
RNG = np.random.Generator(np.random.PCG64(5))


def changed(name: str, index: Any, value: float) -> TableSet:
    array = getattr(TABLES, name).copy()
    array[index] = value
    return dataclasses.replace(TABLES, **{name: array})


def test_the_uncalibrated_tables_are_those_of_the_format_document() -> None:
    document = reference_calibration.uncalibrated_tables().check()
    assert list(TABLES.first) == document.first
    assert TABLES.base.tolist() == document.base
    assert TABLES.refine.tolist() == [[[list(pair) for pair in row] for row in level] for level in document.refine]
    np.testing.assert_allclose(TABLES.shift, document.shift, atol=1e-7)


def test_the_uncalibrated_tables_are_symmetric_and_cannot_be_changed() -> None:
    np.testing.assert_array_equal(TABLES.base[:, :255], TABLES.base[:, 254::-1])
    assert (TABLES.refine[:, 47, 0, 0] == 4096 - TABLES.refine[:, 47, 0, 1]).all()
    with pytest.raises(ValueError, match="read-only"):
        TABLES.base[20, 127] = 1


def test_the_uncalibrated_tables_fit_the_distribution_that_classes_name() -> None:
    """Ideal code lengths of values of a class are within one percent (and a hundredth of a bit) of their entropy."""
    for k in range(10, 44):
        classes = np.full(64, k, np.uint8)
        pick = RNG.random((4000, 64)) < 0.5
        y = np.where(pick, RNG.normal(size=pick.shape), RNG.laplace(scale=0.5**0.5, size=pick.shape))
        q0 = expected_numbers(TABLES, classes, (y * 2.0 ** ((k - 13) / 4)).astype(np.float32)[:200])[0]
        counts = np.bincount(np.clip(q0, -128, 127).ravel() + 128)
        share = counts[counts > 0] / counts.sum()
        symbols = np.clip(q0, -128, 127) + 127
        coded = -np.log2(np.maximum(TABLES.base[k][symbols], 0.25) / 4096).mean()
        assert coded <= 1.02 * -(share * np.log2(share)).sum() + 0.02


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dataclasses.replace(TABLES, first=(10, 11, 1)), "first coded classes"),
        (dataclasses.replace(TABLES, first=(49, 4, 1)), "first coded classes"),
        (dataclasses.replace(TABLES, first=(10, 4, 0)), "first coded classes"),
        (changed("base", (20, 127), 0), "sum to 4096"),
        (changed("base", (9, 0), 1), "not coded must be 0"),
        (changed("refine", (0, 20, 0, 0), 0), "0 < c1 < c2"),
        (changed("refine", (0, 20, 3, 1), 4096), "0 < c1 < c2"),
        (changed("refine", (1, 20, 1, 1), int(TABLES.refine[1, 20, 1, 0])), "0 < c1 < c2"),
        (changed("refine", (0, 3, 0, 0), 1), "not coded must be 0"),
        (changed("shift", (0, 20), 0.51), "0 to 0.5"),
        (changed("shift", (0, 20), -0.01), "0 to 0.5"),
        (changed("shift", (2, 20), np.nan), "0 to 0.5"),
        (dataclasses.replace(TABLES, base=TABLES.base[:47]), "must be uint16"),
        (dataclasses.replace(TABLES, shift=TABLES.shift.astype(np.float64)), "must be float32"),
    ],
)
def test_tables_that_the_format_forbids_are_refused(wrong: TableSet, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        wrong.check()
    with pytest.raises(InvalidArgumentError):
        wrong.native  # noqa: B018


def test_a_frequency_of_4096_and_an_escape_without_one_are_refused() -> None:
    whole = np.zeros(256, np.uint16)
    whole[255] = 4096
    with pytest.raises(InvalidArgumentError, match="below 4096"):
        changed("base", 20, whole).check()
    no_escape = np.zeros(256, np.uint16)
    no_escape[127:129] = 2048
    with pytest.raises(InvalidArgumentError, match="escape"):
        changed("base", 20, no_escape).check()


@pytest.mark.parametrize(
    "wrong",
    [
        dataclasses.replace(TABLES, first=(10, 11, 1)),
        changed("base", (20, 127), 0),
        changed("base", (20, 127), 5000),
        changed("base", (20, 255), 0),
        changed("refine", (0, 20, 0, 0), 0),
        changed("refine", (0, 20, 3, 1), 4096),
        changed("shift", (0, 20), 0.51),
        changed("shift", (0, 20), np.nan),
    ],
)
def test_the_native_tables_refuse_them_too(wrong: TableSet) -> None:
    with pytest.raises(ValueError, match=r"first|base|refine|shift"):
        _native.ScalableTables(np.array(wrong.first, np.uint8), wrong.base, wrong.refine, wrong.shift)


def test_the_native_tables_refuse_wrong_shapes() -> None:
    first = np.array(TABLES.first, np.uint8)
    with pytest.raises(ValueError, match="first"):
        _native.ScalableTables(first[:2], TABLES.base, TABLES.refine, TABLES.shift)
    with pytest.raises(ValueError, match="base"):
        _native.ScalableTables(first, TABLES.base[:, :255].copy(), TABLES.refine, TABLES.shift)
    with pytest.raises(TypeError):
        _native.ScalableTables(first, TABLES.base.astype(np.int32), TABLES.refine, TABLES.shift)


def test_a_class_is_the_logarithm_of_the_root_mean_square() -> None:
    deviation = 2.0 ** ((np.arange(1, 47) - 13) / 4)
    y = (RNG.choice([-1, 1], (256, 46)) * deviation).astype(np.float32)
    classes = classes_of(y)
    assert classes[deviation <= 0.5].max() == 0  # these all round to zero
    np.testing.assert_array_equal(classes[deviation > 0.5], np.arange(1, 47)[deviation > 0.5])


def test_classes_are_0_to_47_whatever_the_values() -> None:
    y = np.array([[0, 1e30, np.nan, np.inf, 0.4, 0.6]] * 3, np.float32)
    classes = classes_of(y)
    assert classes.dtype == np.uint8
    assert classes.tolist()[:5] == [0, 47, 0, 47, 0]
    assert classes[5] >= 1


def test_a_lone_outlier_is_coded_at_the_levels_that_it_needs() -> None:
    y = np.zeros((256, 3), np.float32)
    y[7] = [0.6, 3.5, 9.0]  # of a root mean square of 0.04, 0.22 and 0.56
    classes = classes_of(y)
    assert classes[0] == 0
    assert TABLES.first[1] <= classes[1] < TABLES.first[0]
    assert classes[2] >= TABLES.first[0]


def test_fitted_tables_are_sound_and_shorter_for_what_they_were_fitted_to() -> None:
    classes = np.repeat(np.arange(8, 40), 8).astype(np.uint8)
    deviation = 2.0 ** ((classes.astype(np.float64) - 13) / 4)
    y = (RNG.uniform(-(3**0.5), 3**0.5, (256, 256)) * deviation).astype(np.float32)
    q2 = expected_numbers(TABLES, classes, y)[2].astype(np.int16)
    fitted = fit_tables([q2, q2], [classes, classes])
    fitted.check()

    def size(tables: TableSet) -> int:
        return sum(map(len, encode(tables, classes, y, 3, "auto").words))

    assert size(fitted) < 0.97 * size(TABLES)


def test_a_class_that_was_not_seen_keeps_the_uncalibrated_shape() -> None:
    classes = np.full(32, 20, np.uint8)
    q2 = expected_numbers(TABLES, classes, draw_values(RNG, classes, 100))[2].astype(np.int16)
    fitted = fit_tables([q2], [classes])
    others = np.arange(48) != 20
    np.testing.assert_array_equal(fitted.base[others], TABLES.base[others])
    np.testing.assert_array_equal(fitted.refine[:, others], TABLES.refine[:, others])
    np.testing.assert_array_equal(fitted.shift[:, others], TABLES.shift[:, others])
    assert (fitted.base[20] != TABLES.base[20]).any()


def test_samples_of_every_kind_give_sound_tables() -> None:
    classes = np.arange(48, dtype=np.uint8)
    for q2 in (np.zeros((5, 48)), np.full((5, 48), 32404), np.full((5, 48), -32404), RNG.integers(-9, 9, (1, 48))):
        fit_tables([q2.astype(np.int16)], [classes]).check()
    fit_tables([], []).check()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=128, max_size=128), st.floats(0, 1))
def test_frequencies_sum_to_4096_and_leave_no_small_number_out(weights: list[float], escape: float) -> None:
    total = weights[0] + 2 * sum(weights[1:]) + escape
    if total == 0:
        return
    counts = symmetric_frequencies([weight / total for weight in weights], escape / total)
    assert sum(counts) == 4096
    assert len(counts) == 256
    assert max(counts) <= 4095
    assert min(counts[125:130]) >= 1
    assert counts[255] >= 1
    assert counts[:255] == counts[254::-1]


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.floats(0, 1e9))
def test_thresholds_leave_a_slot_to_each_symbol(inner: float, middle: float, outer: float) -> None:
    c1, c2 = ternary_thresholds(inner, middle, outer)
    assert 0 < c1 < c2 < 4096
