from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlenv.datasets.counts import Counts, Numbers, tally
from mlenv.datasets.hashing import hash_ids

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)


def counts(ids: list[int], capacity: int) -> Counts:
    values, codes = np.unique(np.array(ids, np.int64), return_inverse=True)
    array = pa.array(values)
    return Counts.of(hash_ids(array), tally(codes, len(values), []), array, capacity)


def numbers(found: list[float]) -> Numbers:
    array = np.array(found, np.float64)
    return Numbers.of(array, [np.full(len(array), 2)])


@given(st.lists(st.lists(st.integers(0, 200), max_size=40), min_size=1, max_size=6), st.integers(4, 64))
def test_merging_any_split_equals_one_pass(parts, capacity):
    merged = counts(parts[0], capacity)
    for part in parts[1:]:
        merged = merged.merged(counts(part, capacity))
    whole = counts([value for part in parts for value in part], capacity)
    assert merged.to_plain() == whole.to_plain()
    everything = [value for part in parts for value in part]
    assert whole.by_value() == {value: [everything.count(value)] for value in whole.by_value()}  # exact for those that are kept
    assert len(whole.keys) <= capacity
    if len(set(everything)) <= capacity:
        assert (whole.level, whole.num_distinct) == (0, len(set(everything)))


def test_a_sample_of_values_estimates_how_many_there_are_and_how_often_they_repeat():
    ids = [*range(20_000), *range(400)]
    found = counts(ids, 4096)
    assert 2048 < len(found.keys) <= 4096
    assert found.num_distinct == pytest.approx(20_000, rel=0.05)
    assert found.repeated_share == pytest.approx(400 / 20_400, rel=0.3)


def test_labels_are_tallied_by_task():
    outcomes = [np.array([0, 1, 2, 2]), np.array([2, 2, 2, 0])]
    assert tally(np.array([0, 0, 1, 1]), 3, outcomes).tolist() == [[2, 1, 0, 2, 2], [2, 2, 2, 1, 1], [0, 0, 0, 0, 0]]


def test_the_most_frequent_come_first():
    found = counts([5, 7, 7, 9, 9, 9], 10)
    assert [(value, int(tallied[0])) for value, tallied in found.top(2)] == [(9, 3), (7, 2)]
    assert Counts.from_plain(found.to_plain(), 0).to_plain() == found.to_plain()


@given(st.lists(NUMBERS, min_size=1, max_size=50), st.integers(0, 50))
def test_numbers_of_parts_are_those_of_the_whole(found, cut):
    whole, merged = numbers(found), numbers(found[:cut]).merged(numbers(found[cut:]))
    assert merged.bins.to_plain() == whole.bins.to_plain()
    assert (merged.count, merged.low, merged.high) == (len(found), min(found), max(found))
    assert merged.mean == pytest.approx(np.mean(found), rel=1e-9, abs=1e-9)
    assert merged.deviation == pytest.approx(np.std(found), rel=1e-6, abs=1e-6)


@given(st.lists(NUMBERS, min_size=1, max_size=80), st.floats(0.01, 1.0))
def test_a_quantile_is_within_one_percent(found, share):
    exact = sorted(found)[max(math.ceil(share * len(found) - 1e-9), 1) - 1]
    neighbours = sorted(found)[max(math.ceil(share * len(found) + 1e-9), 1) - 1 :][:1] or [exact]
    assert any(abs(numbers(found).quantile(share) - value) <= 0.01 * abs(value) + 1e-9 for value in (exact, *neighbours))


def test_no_numbers_at_all():
    empty = numbers([])
    assert math.isnan(empty.quantile(0.5))
    assert math.isnan(empty.deviation)
    assert empty.merged(numbers([3.0])).mean == 3.0
    assert Numbers.from_plain(empty.to_plain(), 1).to_plain() == empty.to_plain()
