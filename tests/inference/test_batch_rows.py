"""Rows of batches put together anew: the same as encoding rows that were put together so before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mlenv import compose
from mlenv.batch import START, Batch
from mlenv.datasets.encoded_rows import to_batch
from mlenv.datasets.encoding import encode
from mlenv.inference.batch_rows import borrow_features, join_batches, take_rows
from mlenv.schema import Schema
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def schema() -> Schema:
    return compose(ROOT / "examples/demo/ranker.yaml").schema


@pytest.fixture(scope="module")
def rows(ads: Path, schema: Schema) -> pa.RecordBatch:
    names = list(dict.fromkeys([*schema.columns, *schema.metadata_columns]))
    return pq.read_table(next(ads.rglob("*.parquet"))).select(names).slice(0, 30).combine_chunks().to_batches()[0]


def encoded(rows: pa.RecordBatch, schema: Schema) -> Batch:
    return to_batch([encode(rows, schema, extras=("metadata",))], START)


def assert_same(found: Batch, expected: Batch) -> None:
    assert found.sparse.keys == expected.sparse.keys
    assert found.sparse.value_counts == expected.sparse.value_counts
    for name in ("values", "lengths", "weights"):
        torch.testing.assert_close(getattr(found.sparse, name), getattr(expected.sparse, name), rtol=0, atol=0)
    for name in ("dense", "labels", "weights"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)


def test_rows_are_joined_and_taken(rows, schema):
    whole = encoded(rows, schema)
    joined = join_batches([encoded(rows.slice(0, 7), schema), encoded(rows.slice(7, 23), schema)])
    assert_same(joined, whole)
    assert joined.metadata.equals(whole.metadata)
    order = np.array([5, 5, 0, 29, 11])
    taken = take_rows(whole, torch.from_numpy(order))
    assert_same(taken, encoded(rows.take(pa.array(order)), schema))
    assert taken.metadata.column("impression_id").to_pylist() == rows.column("impression_id").take(pa.array(order)).to_pylist()


def test_features_of_other_rows_are_those_that_columns_of_other_rows_become(rows, schema):
    order = torch.arange(30).roll(3)
    order[::4] = -1
    features = {"history", "interests", "topic_weights", "user_country", "price", "item_vector", "is_weekend"}
    borrowed = {"history_item", "history_action", *(features - {"history"})}
    places = pa.array(torch.where(order < 0, torch.arange(30), order).numpy())
    columns = {name: rows.column(name).take(places) if name in borrowed else rows.column(name) for name in rows.schema.names}
    expected = encoded(pa.RecordBatch.from_pydict(columns), schema)
    own = encoded(rows, schema)
    assert_same(borrow_features(schema, own, own, features, order), expected)
    assert_same(borrow_features(schema, own, own, features, torch.full((30,), -1)), own)
