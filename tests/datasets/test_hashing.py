from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from mlenv.datasets.hashing import hash_ids, hash_rows


def test_integers_hash_as_splitmix64_does():
    # The first outputs of the reference generator: state advances by the golden gamma, so output i is the mix of i * gamma.
    gamma = 0x9E3779B97F4A7C15
    seeds = pa.array(np.array([(i * gamma) % 2**64 for i in range(3)], np.uint64).view(np.int64))
    assert [hex(value) for value in hash_ids(seeds)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_strings_hash_as_xxhash64_does_however_they_are_stored():
    texts = ["a", "", "né", "a"]
    expected = [xxhash.xxh64_intdigest(text.encode()) for text in texts]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        assert hash_ids(pa.array(texts, pa.string()).cast(kind)).tolist() == expected
    assert expected[0] == 0xD24EC4F1A98C6E5B


def test_narrow_integers_hash_as_wide_ones():
    assert hash_ids(pa.array([-1, 5], pa.int8())).tolist() == hash_ids(pa.array([-1, 5], pa.int64())).tolist()
    assert len(hash_ids(pa.array([], pa.int64()))) == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([1, None, 3], pa.int8()), pa.array([1, None, 3], pa.int64())),
        (pa.array(["a", None, "b"]), pa.array(["a", None, "b"]).dictionary_encode()),
        (pa.array([0.0, 1.5], pa.float32()), pa.array([-0.0, 1.5], pa.float64())),
        (pa.array([[1, 2], None, [], [None]]), pa.array([[1, 2], None, [], [None]], pa.large_list(pa.int8()))),
        (
            pa.array([[("a", 1.0)], []], pa.map_(pa.string(), pa.float32())),
            pa.array([[("a", 1.0)], []], pa.map_(pa.string(), pa.float64())),
        ),
    ],
)
def test_rows_that_hold_the_same_hash_alike_however_they_are_stored(one, other):
    assert hash_rows([one]).tolist() == hash_rows([other]).tolist()
    assert len(set(hash_rows([one]).tolist())) == len(one)
    assert hash_rows([one.slice(1)]).tolist() == hash_rows([one]).tolist()[1:]


def test_rows_that_differ_hash_apart():
    lists = pa.array([[1, 2], [2, 1], [1], [2], [1, 2, None], [1, None, 2], [0], [], None, [None], [0, 0]])
    assert len(set(hash_rows([lists]).tolist())) == len(lists)
    a, b = pa.array([1, 2]), pa.array([2, 1])
    assert len({*hash_rows([a, b]).tolist(), *hash_rows([b, a]).tolist(), *hash_rows([a]).tolist()}) == 4
