from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlenv.batch import Position
from mlenv.datasets.columns import check_columns
from mlenv.datasets.encoded_rows import join, to_batch
from mlenv.datasets.encoding import RowError, encode
from mlenv.datasets.hashing import hash_ids
from mlenv.schema import (
    Binary,
    Categorical,
    DenseVector,
    Label,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
    SequenceField,
    Table,
    Weighted,
)

SCHEMA = Schema(
    features={
        "item": Categorical(),
        "country": Categorical(storage="string"),
        "device": Categorical(storage="string", default="phone"),
        "tags": MultiCategorical(max_length=2),
        "topics": Weighted(),
        "price": Numeric(default=-1.0),
        "is_new": Binary(default=True),
        "vector": DenseVector(dim=2),
        "history": Sequence(fields={"item": SequenceField(table="item"), "action": SequenceField(storage="string")}, max_length=2),
    },
    tables={
        "item": Table(num_embeddings=10, embedding_dim=4),
        "country": Table(num_embeddings=1000, embedding_dim=4, ids="hash"),
        "device": Table(num_embeddings=2, embedding_dim=4, ids="vocabulary", vocabulary=("phone", "tv")),
        "tags": Table(num_embeddings=5, embedding_dim=4),
        "topics": Table(num_embeddings=5, embedding_dim=4),
        "history_action": Table(num_embeddings=5, embedding_dim=2, ids="vocabulary", vocabulary=("click",), out_of_range="hash"),
    },
    labels={"click": Label(), "buy": Label(mask="click", weight="value")},
    row_key=("key",),
)
ROWS = {
    "item": pa.array([3, None, 9]),
    "country": pa.array(["at", None, "at"]),
    "device": pa.array(["tv", None, "phone"]),
    "tags": pa.array([[1, None, 2, 3], None, []], pa.list_(pa.int64())),
    "topics": pa.array([[(1, 0.5), (4, None)], [], None], pa.map_(pa.int64(), pa.float32())),
    "price": pa.array([1.5, None, float("nan")]),
    "is_new": pa.array([False, None, True]),
    "vector": pa.array([[1.0, 2.0], None, [3.0, None]], pa.list_(pa.float32(), 2)),
    "history_item": pa.array([[1, 2, 3], [], None], pa.list_(pa.int32())),
    "history_action": pa.array([["click", "other", "click"], [], None], pa.list_(pa.string())),
    "click": pa.array([1, 0, 1], pa.int8()),
    "buy": pa.array([1, None, 0], pa.int8()),
    "value": pa.array([2.0, 3.0, 0.5]),
    "key": pa.array([100, 101, 102]),
}


def rows(**changes):
    return pa.RecordBatch.from_pydict(ROWS | changes)


def bags(batch):
    """Ids per key and example, the slow obvious way."""
    sparse, place, result = batch.sparse, 0, {}
    for number, key in enumerate(sparse.keys):
        result[key] = []
        for length in sparse.lengths[number * sparse.batch_size : (number + 1) * sparse.batch_size].tolist():
            result[key].append(sparse.values[place : place + length].tolist())
            place += length
    assert place == len(sparse.values)
    return result


def test_every_kind_becomes_numbers():
    batch = to_batch([encode(rows(), SCHEMA, extras=("metadata",))], Position(0, 0, 3))
    at = int(hash_ids(pa.array(["at"]))[0] % 1000)
    other = 1 + int(hash_ids(pa.array(["other"]))[0] % 4)
    assert bags(batch) == {
        "country": [[at], [], [at]],
        "device": [[1], [0], [0]],
        "tags": [[1], [], []],  # cut to two elements, of which one is null
        "topics": [[1, 4], [], []],
        "item": [[3], [], [9]],
        "history.item": [[2, 3], [], []],  # the last two
        "history.action": [[other, 0], [], []],
    }
    weighted = batch.sparse.select(3, 4)
    assert weighted.keys == ("topics",)
    assert weighted.weights.tolist() == [0.5, 0.0]
    assert batch.dense.tolist() == [[1.5, 0, 1, 2], [-1, 1, 0, 0], [-1, 1, 3, 0]]
    assert batch.labels.tolist() == [[1, 1], [0, 0], [1, 0]]
    assert batch.weights.tolist() == [[1, 2], [1, 0], [1, 0.5]]
    assert batch.metadata.to_pydict() == {"key": [100, 101, 102]}
    assert (batch.dense.dtype, batch.sparse.values.dtype, batch.sparse.lengths.dtype) == (torch.float32, torch.int64, torch.int32)


TAUGHT = Schema(
    features={"price": Numeric()},
    labels={"click": Label(teacher="teacher_click"), "buy": Label(column="click")},
    request="request",
)
ASKED = ("requests", "teacher")


def test_requests_and_a_teacher_come_when_asked():
    columns = {"request": pa.array(["b", None, "a", "b", None]), "teacher_click": pa.array([0, 1.0, None, 0.25, float("nan")])}
    table = pa.RecordBatch.from_pydict({"price": [1.0] * 5, "click": [0] * 5, **columns})
    plain = to_batch([encode(table, TAUGHT)], Position())
    assert plain.requests is plain.teacher is None
    encoded = encode(table, TAUGHT, extras=ASKED)
    batch = to_batch([encoded], Position()).to("cpu")
    at = {text: int(hash_ids(pa.array([text]))[0] >> np.uint64(1)) for text in "ab"}
    assert batch.requests.tolist() == [at["b"], -2, at["a"], at["b"], -5]
    torch.testing.assert_close(batch.teacher[:, 0], torch.tensor([0, 1, np.nan, 0.25, np.nan]), equal_nan=True)
    assert batch.teacher[:, 1].isnan().all()
    assert (batch.requests.dtype, batch.teacher.dtype, batch.metadata) == (torch.int64, torch.float32, None)
    order = np.array([3, 4, 1, 0, 2])
    other = to_batch([join([encoded.rows(3, 5), encoded.rows(1, 2)]), encoded.take(order).rows(3, 5)], Position())
    assert other.requests.tolist() == [at["b"], -2, -3, at["b"], at["a"]]  # rows without a request stay apart over all pieces
    torch.testing.assert_close(other.teacher, batch.teacher[order], equal_nan=True)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([7, 8, 7, None], pa.int16()),
        pa.array([7.0, 8.0, 7.0, float("nan")]),
        pa.array(["x", "y", "x", None]).dictionary_encode(),
        pa.array([7, 8, 7, None]).dictionary_encode(),
        pa.DictionaryArray.from_arrays(pa.array([1, 0, 1, 2]), pa.array(["y", "x", None])),
        pa.array([7, 8, 7, None], pa.timestamp("us", "UTC")),
        pa.array([True, False, True, None]),
    ],
    ids=lambda values: str(values.type),
)
def test_a_request_may_be_any_plain_value(values):
    table = pa.RecordBatch.from_pydict({"price": [1.0] * 4, "click": [0] * 4, "request": values, "teacher_click": [0.5] * 4})
    assert not list(check_columns(table.schema, TAUGHT, "here", extras=ASKED))
    first, second, third, none = encode(table, TAUGHT, extras=ASKED).requests.tolist()
    assert first == third != second
    assert min(first, second) >= 0
    assert none == -1


@pytest.mark.parametrize("value", [-0.1, 1.5, float("inf")])
def test_what_is_no_probability_is_no_teacher(value):
    table = pa.RecordBatch.from_pydict({"price": [1.0] * 2, "click": [0] * 2, "request": [1, 1], "teacher_click": [0.5, value]})
    with pytest.raises(RowError, match=r"row 1, column 'teacher_click': expected a prediction in \[0, 1\]"):
        encode(table, TAUGHT, extras=["teacher"])
    wrong = table.set_column(3, "teacher_click", pa.array(["a", "b"]))
    for extras in ([], ["teacher"]):
        assert ["a probability" in str(error) for error in check_columns(wrong.schema, TAUGHT, "here", extras=extras)] == [True]
    missing = table.drop_columns(["teacher_click"])
    assert not list(check_columns(missing.schema, TAUGHT, "here", extras=["requests"]))
    assert len(list(check_columns(missing.schema, TAUGHT, "here", extras=["teacher"]))) == 1


def test_cutting_and_joining_loses_nothing():
    whole = encode(rows(), SCHEMA, extras=("metadata",))
    order = np.array([2, 0, 1])
    pieces = to_batch([whole.take(order).rows(0, 1), whole.take(order).rows(1, 3)], Position())
    together = to_batch([encode(rows().take(pa.array(order)), SCHEMA, extras=("metadata",))], Position())
    assert bags(pieces) == bags(together)
    assert torch.equal(pieces.sparse.weights, together.sparse.weights)
    assert torch.equal(pieces.dense, together.dense)
    assert torch.equal(pieces.labels, together.labels)
    assert pieces.metadata.equals(together.metadata)
    joined = to_batch([join([whole.rows(0, 1), whole.rows(1, 1), whole.rows(1, 3)])], Position())
    assert bags(joined) == bags(to_batch([whole], Position()))
    assert joined.metadata.equals(rows().select(["key"]))


def test_storage_may_vary():
    pairs = pa.array([[{"id": 1, "weight": 0.5}], [], None], pa.list_(pa.struct([("id", pa.int64()), ("weight", pa.float64())])))
    changes = {
        "country": ROWS["country"].dictionary_encode(),
        "item": ROWS["item"].cast(pa.int8()),
        "topics": pairs,
        "tags": ROWS["tags"].cast(pa.large_list(pa.int16())),
        "price": pa.array([1, None, 2]),
        "is_new": pa.array([0, None, 1]),
        "click": pa.array([True, False, True]),
        "device": ROWS["device"].dictionary_encode(),
    }
    assert not list(check_columns(rows(**changes).schema, SCHEMA, "here", extras=("metadata",)))
    batch = to_batch([encode(rows(**changes), SCHEMA)], Position())
    assert bags(batch)["country"] == bags(to_batch([encode(rows(), SCHEMA)], Position()))["country"]
    assert batch.dense[:, 0].tolist() == [1, -1, 2]
    assert bags(batch)["device"] == [[1], [0], [0]]


def test_slices_of_columns_are_read_at_their_offset():
    doubled = pa.concat_tables([pa.Table.from_batches([rows()])] * 2).combine_chunks().to_batches()[0]
    assert bags(to_batch([encode(doubled.slice(3), SCHEMA)], Position())) == bags(to_batch([encode(rows(), SCHEMA)], Position()))


@pytest.mark.parametrize(
    ("changes", "row", "column", "received"),
    [
        ({"item": pa.array([3, 9, 10])}, 2, "item", 10),
        ({"item": pa.array([3, -1, 10])}, 1, "item", -1),
        ({"device": pa.array(["tv", "tv", "car"])}, 2, "device", "car"),
        ({"tags": pa.array([[], [1, 7], []])}, 1, "tags", 7),
        ({"click": pa.array([1, None, 0])}, 1, "click", None),
        ({"click": pa.array([1, 2, 0])}, 1, "click", 2),
        ({"value": pa.array([1.0, 1.0, -1.0])}, 2, "value", -1.0),
        ({"value": pa.array([1.0, float("inf"), 1.0])}, 1, "value", float("inf")),
        ({"topics": pa.array([[], [(1, float("inf"))], None], pa.map_(pa.int64(), pa.float32()))}, 1, "topics", "inf"),
        ({"price": pa.array([1.0, float("-inf"), None])}, 1, "price", "-inf"),
        ({"item": pa.array([1, 2, 2**63], pa.uint64())}, 2, "item", 2**63),
        ({"is_new": pa.array([0, 5, 1])}, 1, "is_new", 5),
        ({"vector": pa.array([[1.0, 2.0], [1.0], None])}, 1, "vector", "1 numbers"),
        ({"history_action": pa.array([["click", "click"], [], None])}, 0, "history_item", 3),
        ({"history_action": pa.array([["click"] * 3, ["click"], None])}, 1, "history_item", 0),
        ({"history_item": pa.array([[1, None], [], None]), "history_action": pa.array([["a", "b"], [], None])}, 0, "history_item", None),
    ],
)
def test_a_wrong_value_is_found_in_its_row(changes, row, column, received):
    with pytest.raises(RowError) as caught:
        encode(rows(**changes), SCHEMA)
    error = caught.value
    assert (error.row, error.column, error.received) == (row, column, received)


def test_ids_out_of_range_may_be_hashed():
    table = Table(num_embeddings=10, embedding_dim=4, out_of_range="hash")
    schema = Schema(features={"item": Categorical()}, tables={"item": table}, labels={"click": Label()})
    batch = to_batch([encode(pa.RecordBatch.from_pydict({"item": [3, 10, -5], "click": [0, 0, 1]}), schema)], Position())
    assert batch.sparse.values.tolist() == [3, *(hash_ids(pa.array([10, -5])) % 10).tolist()]


def test_columns_that_do_not_fit_are_all_named():
    wrong = rows(item=pa.array(["a", "b", "c"]), price=pa.array(["1", "2", "3"]), tags=pa.array([1, 2, 3]), topics=ROWS["tags"])
    columns = wrong.drop_columns(["country"]).schema
    messages = [str(error) for error in check_columns(columns, SCHEMA, "part-0.parquet", extras=("metadata",))]
    assert len(messages) == 5
    assert messages[0].startswith("part-0.parquet, column 'country': expected a column of this name. Received: 'none'.")
    assert any("column 'item': expected int64. Received: 'string'" in message for message in messages)
    assert any("column 'price': expected a number" in message for message in messages)
    assert any("column 'tags': expected list<int64>" in message for message in messages)
    assert any("column 'topics': expected map<int64, float>" in message for message in messages)


def test_a_null_pair_is_dropped():
    kind = pa.list_(pa.struct([("id", pa.int64()), ("weight", pa.float32())]))
    pairs = pa.array([[{"id": 1, "weight": 0.5}, None, {"id": 2, "weight": 3.0}], [None], None], kind)
    batch = to_batch([encode(rows(topics=pairs), SCHEMA)], Position())
    assert bags(batch)["topics"] == [[1, 2], [], []]
    assert batch.sparse.select(3, 4).weights.tolist() == [0.5, 3.0]


def test_a_null_number_without_a_default_stays_null():
    schema = Schema(features={"price": Numeric(default=None), "age": Numeric()}, labels={"click": Label()})
    ages = {"age": pa.array([None, 1, 2])}
    batch = to_batch([encode(rows(**ages), schema)], Position())
    assert batch.dense[0].tolist() == [1.5, 0]
    assert batch.dense[1:, 0].isnan().all()
    assert batch.dense[1:, 1].tolist() == [1, 2]
    for infinity in ("inf", "-inf"):
        with pytest.raises(RowError) as caught:
            encode(rows(price=pa.array([None, 1.0, float(infinity)]), **ages), schema)
        assert (caught.value.row, caught.value.received) == (2, infinity)


def test_no_rows_and_no_sparse_features():
    empty = to_batch([encode(rows().slice(0, 0), SCHEMA)], Position())
    assert len(empty) == 0
    dense = Schema(features={"price": Numeric()}, labels={"click": Label()})
    batch = to_batch([encode(rows(), dense)], Position())
    assert batch.sparse.keys == ()
    assert batch.dense.shape == (3, 1)


TEXT = st.text("abü", max_size=3)
ARRAYS = {
    "item": (pa.int64(), st.none() | st.integers(0, 9)),
    "country": (pa.string(), st.none() | TEXT),
    "device": (pa.string(), st.none() | st.sampled_from(["phone", "tv"])),
    "tags": (pa.list_(pa.int64()), st.none() | st.lists(st.none() | st.integers(0, 4), max_size=4)),
    "price": (pa.float32(), st.none() | st.floats(-1e6, 1e6, width=32)),
    "is_new": (pa.bool_(), st.none() | st.booleans()),
}


@given(st.lists(st.fixed_dictionaries({name: values for name, (_, values) in ARRAYS.items()}), min_size=1, max_size=20), st.integers(0, 20))
def test_every_row_reaches_the_batch_as_a_slow_reading_gives_it(rows, cut):
    names = dict.fromkeys(ARRAYS)
    schema = Schema(
        features={name: feature for name, feature in SCHEMA.features.items() if name in names},
        tables={name: table for name, table in SCHEMA.tables.items() if name in names},
        labels={"click": Label()},
    )
    types = pa.schema({name: kind for name, (kind, _) in ARRAYS.items()} | {"click": pa.int8()})
    rows = [row | {"click": number % 2} for number, row in enumerate(rows)]
    pieces = [piece for piece in (rows[:cut], rows[cut:]) if piece]
    batch = to_batch([encode(pa.RecordBatch.from_pylist(piece, types), schema) for piece in pieces], Position())

    def hashed(text):
        return int(hash_ids(pa.array([text]))[0] % np.uint64(1000))

    expected = {
        "item": [[] if row["item"] is None else [row["item"]] for row in rows],
        "country": [[] if row["country"] is None else [hashed(row["country"])] for row in rows],
        "device": [[["phone", "tv"].index(row["device"] or "phone")] for row in rows],
        "tags": [[tag for tag in (row["tags"] or [])[:2] if tag is not None] for row in rows],
    }
    bags = torch.split(batch.sparse.values, batch.sparse.lengths.tolist())
    found = {
        key: [bag.tolist() for bag in bags[place * len(rows) : (place + 1) * len(rows)]] for place, key in enumerate(batch.sparse.keys)
    }
    assert found == expected
    prices = [-1.0 if row["price"] is None else row["price"] for row in rows]
    flags = [True if row["is_new"] is None else row["is_new"] for row in rows]
    assert batch.dense.tolist() == [[price, float(flag)] for price, flag in zip(prices, flags, strict=True)]
    assert batch.labels[:, 0].tolist() == [number % 2 for number in range(len(rows))]
