"""Two columns beside each other: the same as a slow comparison of Python's values, however the rows are cut."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlenv.datasets.agreement import Agreement, check_comparable, measure_agreement
from mlenv.errors import ConfigError

FEW = st.integers(0, 2)
KINDS = {
    "ids": (FEW, pa.int32(), pa.int64()),
    "numbers": (st.sampled_from([0.0, 1.0, 1.0 + 1e-9, 1.5, math.nan, math.inf]), pa.float64(), pa.float64()),
    "number and id": (st.integers(0, 2), pa.float32(), pa.int16()),
    "truth values": (st.booleans(), pa.bool_(), pa.bool_()),
    "texts": (st.sampled_from(["", "a", "b"]), pa.string(), pa.dictionary(pa.int32(), pa.large_string())),
    "ids in lists": (st.lists(st.none() | FEW, max_size=2), pa.list_(pa.int64()), pa.large_list(pa.int32())),
    "vectors": (
        st.lists(st.sampled_from([0.5, 0.5 + 1e-9, 2.0]), min_size=2, max_size=2),
        pa.list_(pa.float32(), 2),
        pa.list_(pa.float64()),
    ),
    "weights": (
        st.dictionaries(st.sampled_from("xy"), st.sampled_from([0.5, 1.0]), max_size=2).map(lambda found: list(found.items())),
        pa.map_(pa.string(), pa.float32()),
        pa.map_(pa.string(), pa.float64()),
    ),
}


def same(first, second) -> bool:
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(*pair) for pair in zip(first, second, strict=True))
    if isinstance(first, float) and isinstance(second, float):
        return (math.isnan(first) and math.isnan(second)) or math.isclose(first, second, rel_tol=1e-6)
    return first == second


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_what_is_counted_is_what_a_slow_comparison_gives(kind, data):
    values, *types = KINDS[kind]
    rows = data.draw(st.lists(st.tuples(st.none() | values, st.none() | values, st.sampled_from([None, "d1", "d2"])), max_size=20))
    first, second, days = (pa.array([row[place] for row in rows], kind) for place, kind in enumerate([*types, pa.string()]))
    both = [(one, other, day or "") for one, other, day in zip(first.to_pylist(), second.to_pylist(), days.to_pylist(), strict=True)]
    both = [row for row in both if row[0] is not None and row[1] is not None]
    whole = Agreement.of(first, second, days, 1e-6)
    assert (whole.rows, whole.first, whole.second) == (len(rows), len(rows) - first.null_count, len(rows) - second.null_count)
    for day in {day for *_, day in both} | set(whole.both):
        of_day = [(one, other) for one, other, found in both if found == day]
        assert (whole.both[day], whole.differing[day]) == (len(of_day), sum(not same(*pair) for pair in of_day))
    cuts = sorted({0, len(rows), *data.draw(st.lists(st.integers(0, len(rows)), max_size=3))})
    parts = [Agreement.of(*(column.slice(start, stop - start) for column in (first, second, days)), 1e-6) for start, stop in pairwise(cuts)]
    for order in (parts, parts[::-1]):
        merged = functools.reduce(Agreement.merged, order, Agreement())
        assert {**vars(merged), "moments": None} == {**vars(whole), "moments": None}
        assert merged.moments.count == whole.moments.count
        assert merged.moments.means == pytest.approx(whole.moments.means)
        assert merged.moments.squares == pytest.approx(whole.moments.squares, abs=1e-9)


def test_means_and_correlation_are_those_of_numpy():
    generator = np.random.default_rng(0)
    first = generator.normal(size=500)
    second = first + generator.normal(size=500) + 3
    batches = [
        (pa.RecordBatch.from_pydict({"a": part, "b": other}), None) for part, other in ((first[:9], second[:9]), (first[9:], second[9:]))
    ]
    moments = measure_agreement(batches, {"a": "b"}, 0.0)["a"].moments
    assert moments.means == pytest.approx((first.mean(), second.mean()))
    assert moments.correlation == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert math.isnan(Agreement.of(pa.array([1.0, 1.0]), pa.array([1.0, 2.0]), None, 0.0).moments.correlation)


def test_the_worst_day_is_the_one_with_the_largest_share():
    found = Agreement.of(pa.array([1, 1, 1, 1]), pa.array([1, 2, 3, 1]), pa.array(["a", "a", "b", None]), 0.0)
    assert (found.worst_day, found.differing_share) == (("b", 1.0), 0.5)


def test_a_truth_value_may_be_stored_as_0_and_1():
    found = Agreement.of(pa.array([True, False, True]), pa.array([1, 0, 0], pa.int8()), None, 0.0)
    assert (found.num_both, found.differing) == (3, {"": 1})


def test_kinds_that_cannot_be_compared_are_refused():
    check_comparable(pa.field("a", pa.list_(pa.int8())), pa.field("b", pa.large_list(pa.float32())))
    for kind in (pa.string(), pa.list_(pa.int64()), pa.timestamp("ms")):
        with pytest.raises(ConfigError, match=r"a: expected a column of the same kind\. Received: 'b, which is .*, beside int64'"):
            check_comparable(pa.field("a", pa.int64()), pa.field("b", kind))
