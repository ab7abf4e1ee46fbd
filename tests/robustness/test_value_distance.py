"""Distances of feature values by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mlenv.robustness.value_distance import codes_of_values, compare_values, is_nothing, kind_of_values

PAIRS = pa.map_(pa.int64(), pa.float64())


def column(values: list[object], kind: pa.DataType | None = None) -> pa.ChunkedArray:
    half = len(values) // 2
    return pa.chunked_array([values[:half], values[half:]], kind or pa.array(values).type)


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (pa.float32(), pa.int64(), "number"),
        (pa.int64(), pa.int32(), "id"),
        (pa.bool_(), pa.int8(), "id"),
        (pa.string(), pa.int64(), "id"),
        (pa.list_(pa.float32()), pa.list_(pa.float64(), 3), "vector"),
        (pa.list_(pa.int64()), pa.large_list(pa.int64()), "bag"),
        (PAIRS, pa.list_(pa.struct([("id", pa.int64()), ("weight", pa.float32())])), "bag"),
        (pa.list_(pa.int64()), pa.int64(), None),
    ],
)
def test_kinds_follow_from_types(first, second, kind):
    assert kind_of_values(first, second) == kind


def test_numbers_are_measured_by_the_usual_distance_of_two_rows():
    logged = np.array([0.0, 10.0] * 50)  # two rows that differ are 10 apart
    served = logged.copy()
    served[:6] = [0.005, 10.02, 5.0, np.nan, 40.0, 10.0]
    compared = compare_values(column(served.tolist()), column(logged.tolist()), tolerance=1e-3)
    assert compared.kind == "number"
    assert compared.distances[:6].tolist() == pytest.approx([0, 0.002, 0.5, 1, 1, 0])
    assert not compared.differs[6:].any()
    assert compared.differs[:6].tolist() == [False, True, True, True, True, False]


def test_rounding_to_float32_is_no_difference_whatever_the_size():
    logged = np.random.default_rng(0).normal(1.7e9, 1.0, 1000)  # such as a time in seconds
    rounded = column(logged.astype(np.float32).tolist(), pa.float32())
    assert not compare_values(rounded, column(logged.tolist()), tolerance=1e-3).differs.any()
    both = [codes_of_values(one, "number") for one in (rounded, column(logged.tolist()))]
    assert np.array_equal(*both)
    # A day of seconds is a difference, though it is a 20,000th of the number: rows are a week apart.
    times = np.random.default_rng(0).uniform(1.7e9, 1.7e9 + 7 * 86_400, 1000)
    assert compare_values(column((times - 86_400).tolist()), column(times.tolist()), tolerance=1e-3).differs.all()


def test_ids_and_lists_of_ids():
    ids = compare_values(column([1, 2, None, None]), column([1, 3, 4, None], pa.int32()), 1e-3)
    assert ids.distances.tolist() == [0, 1, 1, 0]
    assert compare_values(column(["7", "a"]), column([7, 8]), 1e-3).distances.tolist() == [0, 1]
    first = column([[1, 2, 3], [1, 1], [], None, [4], None])
    second = column([[3, 2, 4], [1], [5], [], [4], [6]])
    bags = compare_values(first, second, 1e-3)
    # {1 2 3} and {2 3 4}: 2 of 4; twice and once the same id: 1 of 2.
    assert bags.distances.tolist() == pytest.approx([0.5, 0.5, 1, 0, 0, 1])
    assert is_nothing(first).tolist() == [False, False, True, True, False, True]


def test_weighted_ids_and_vectors():
    first = column([[(1, 0.5), (2, 1.0)], [(1, 1.0)]], PAIRS)
    second = column([[(1, 0.25), (3, 0.5)], [(1, np.float32(1 / 3) * 3)]], PAIRS)
    # |0.5-0.25| + 1 + 0.5 over 0.5 + 1 + 0.5
    assert compare_values(first, second, 1e-3).distances.tolist() == pytest.approx([0.875, 0])
    narrow = column([[(1, 0.1)], [(2, 0.2)]], pa.map_(pa.int64(), pa.float32()))
    wide = column([[(1, 0.1)], [(2, 0.3)]], PAIRS)
    assert (codes_of_values(narrow, "bag") == codes_of_values(wide, "bag")).tolist() == [True, False]
    logged = [[0.0, 0.0], [3.0, 4.0]] * 20  # 5 apart
    served = [[0.0, 2.5], [3.0, 4.0], None, [1.0], *logged[4:]]
    vectors = compare_values(column(served), column(logged), 1e-3)
    assert vectors.distances[:5].tolist() == pytest.approx([0.5, 0, 1, 1, 0])
    odd = compare_values(column([[1.0], None, *logged]), column([[2.0], None, *logged]), 1e-3)
    assert odd.distances[:3].tolist() == [1, 0, 0]


def test_times_are_the_same_in_any_unit():
    first = column([1_700_000_000_000, 1_700_000_000_001], pa.timestamp("ms", "UTC"))
    second = column([1_700_000_000_000_000, 1_700_000_000_000_000], pa.timestamp("us", "UTC"))
    assert compare_values(first, second, 1e-3).distances.tolist() == [0, 1]
