from __future__ import annotations

import datetime
import functools
import json
import math
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlenv.datasets.statistics import Statistics, collect, read_statistics, statistics_columns
from mlenv.errors import DataError
from mlenv.schema import Binary, Categorical, DenseVector, Label, MultiCategorical, Numeric, Schema, SequenceField, Table, Weighted
from mlenv.schema import Sequence as EventSequence

SCHEMA = Schema(
    features={
        "user": Categorical(),
        "colour": Categorical(storage="string"),
        "tags": MultiCategorical(),
        "interests": Weighted(storage="string"),
        "history": EventSequence(fields={"item": SequenceField(table="user"), "action": SequenceField(table="colour", storage="string")}),
        "price": Numeric(),
        "is_new": Binary(),
        "vector": DenseVector(dim=2),
    },
    tables={name: Table(num_embeddings=100, ids="hash") for name in ("user", "colour", "tags", "interests")},
    labels={"click": Label(), "buy": Label(mask="click")},
    row_key=("key",),
    event_time="time",
    segments=("place",),
)
START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
TYPES = pa.schema(
    {
        "key": pa.int64(),
        "time": pa.timestamp("ms", "UTC"),
        "place": pa.string(),
        "click": pa.int8(),
        "buy": pa.bool_(),
        "user": pa.int64(),
        "colour": pa.dictionary(pa.int32(), pa.string()),
        "tags": pa.list_(pa.int32()),
        "interests": pa.map_(pa.string(), pa.float32()),
        "history_item": pa.large_list(pa.int64()),
        "history_action": pa.list_(pa.string()),
        "price": pa.float32(),
        "is_new": pa.bool_(),
        "vector": pa.list_(pa.float32()),
    }
)
FEW = st.integers(0, 3)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "key": st.integers(0, 30),
            "time": st.integers(0, 100).map(lambda hours: START + datetime.timedelta(hours=hours)),
            "place": st.none() | st.sampled_from("ab"),
            "click": st.integers(0, 1),
            "buy": st.none() | st.booleans(),
            "user": st.none() | FEW,
            "colour": st.none() | st.sampled_from(["red", "blue"]),
            "tags": st.none() | st.lists(st.none() | FEW, max_size=3),
            "interests": st.none()
            | st.dictionaries(st.sampled_from("xyz"), st.none() | st.floats(0, 1, width=32), max_size=2).map(
                lambda found: list(found.items())
            ),
            "history_item": st.none() | st.lists(FEW, max_size=2),
            "history_action": st.none() | st.lists(st.sampled_from(["view", "buy"]), max_size=2),
            "price": st.none() | st.floats(width=32),
            "is_new": st.none() | st.booleans(),
            "vector": st.none() | st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=2),
        }
    ),
    min_size=1,
    max_size=30,
)


def batch(rows: list[dict]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, TYPES)


def comparable(statistics: Statistics) -> str:
    """The JSON without means and squares, which agree to rounding; see test_counts."""
    plain = json.loads(statistics.to_json())
    for spread in (column[part] for column in plain["columns"].values() for part in ("numbers", "lengths") if part in column):
        del spread["mean"], spread["squares"]
    return json.dumps(plain, sort_keys=True)


@given(ROWS, st.lists(st.integers(0, 30), max_size=4))
def test_merging_any_split_equals_one_pass(rows, cuts):
    bounds = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    parts = [batch(rows[start:stop]) for start, stop in pairwise(bounds)]
    whole = collect([batch(rows)], SCHEMA)
    assert comparable(collect(parts, SCHEMA)) == comparable(whole)
    assert comparable(collect(reversed(parts), SCHEMA)) == comparable(whole)


@given(ROWS, st.lists(st.integers(0, 30), max_size=4), st.randoms())
def test_merging_rows_in_any_order_through_json_equals_one_pass(rows, cuts, random):
    order = rows.copy()
    random.shuffle(order)
    bounds = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    parts = [collect([batch(order[start:stop])], SCHEMA) for start, stop in pairwise(bounds)]
    stored = [Statistics.from_json(part.to_json()) for part in parts]
    merged, whole = functools.reduce(Statistics.merged, stored), collect([batch(rows)], SCHEMA)
    assert comparable(merged) == comparable(whole)
    assert merged.to_json() == functools.reduce(Statistics.merged, parts).to_json()
    for name, column in whole.columns.items():
        for part in ("numbers", "lengths"):
            if (spread := getattr(column, part)) is not None:
                assert getattr(merged.columns[name], part).mean == pytest.approx(spread.mean, rel=1e-9, abs=1e-9 * max(abs(spread.low), 1))
        np.testing.assert_allclose(merged.columns[name].label_aucs(), column.label_aucs(), rtol=1e-12)


@given(ROWS)
def test_what_is_counted_is_what_a_slow_count_gives(rows):
    found = collect([batch(rows)], SCHEMA)
    assert Statistics.from_json(found.to_json()).to_json() == found.to_json()
    users = [row["user"] for row in rows if row["user"] is not None]
    assert {value: int(tallied[0]) for value, tallied in found.columns["user"].values.by_value().items()} == {
        user: users.count(user) for user in users
    }
    prices = [row["price"] for row in rows if row["price"] is not None and math.isfinite(row["price"])]
    price = found.columns["price"]
    assert (price.rows, price.nulls, price.numbers.count) == (len(rows), sum(row["price"] is None for row in rows), len(prices))
    assert price.not_finite == len(rows) - price.nulls - len(prices)
    assert price.numbers.low == min(prices, default=math.inf)
    tags = found.columns["tags"]
    assert tags.coverage == pytest.approx(sum(bool(row["tags"]) for row in rows) / len(rows))
    assert tags.values.num_kept == sum(tag is not None for row in rows for tag in row["tags"] or [])
    assert tags.lengths.mean == pytest.approx(np.mean([len(row["tags"]) for row in rows if row["tags"]] or [0]))
    keys = [row["key"] for row in rows]
    assert found.row_keys.repeated_share == pytest.approx(1 - len(set(keys)) / len(keys))
    contents = [repr({name: value for name, value in row.items() if name != "key"}) for row in rows]
    assert found.all_rows.num_distinct <= len(set(contents))  # -0.0 and 0.0 print differently
    clicked = [row for row in rows if row["click"] and row["buy"] is not None]
    counted, rate = found.label_rate("buy", found.labels)
    assert counted == len(clicked)
    assert not clicked or rate == pytest.approx(sum(row["buy"] for row in clicked) / len(clicked))
    for value, tallied in found.segments["place"].by_value().items():
        of_value = [row for row in rows if row["place"] == value]
        assert found.label_rate("click", tallied) == (len(of_value), pytest.approx(sum(row["click"] for row in of_value) / len(of_value)))
    newest = max(row["time"] for row in rows)
    assert max(found.newest.values()) == newest.timestamp() * 1000
    assert max(found.days.by_value()) == newest.strftime("%Y-%m-%d")


def plain(columns: dict, schema: Schema) -> Statistics:
    return collect([pa.RecordBatch.from_pydict(columns)], schema)


def one_feature(feature) -> Schema:
    tables = {"x": Table(num_embeddings=10, ids="hash")} if isinstance(feature, Categorical) else {}
    return Schema(features={"x": feature}, tables=tables, labels={"click": Label()})


def test_an_id_that_never_repeats_is_no_leak_and_one_that_decides_is():
    generator = np.random.default_rng(0)
    click = generator.integers(0, 2, 4000)
    for ids, least, most in (
        (np.arange(4000), 0.5, 0.5),
        (generator.integers(0, 1000, 4000), 0.47, 0.53),
        (generator.integers(0, 3, 4000), 0.3, 0.53),  # nothing to tell: leaving a row out shows between values as large as these
        (click * 500 + generator.integers(0, 500, 4000), 0.99, 1.0),
        (np.where(generator.random(4000) < 0.9, click, 1 - click), 0.89, 0.91),
    ):
        [auc] = plain({"x": ids, "click": click}, one_feature(Categorical())).columns["x"].label_aucs()
        assert least <= auc <= most


def test_the_auc_of_a_feature_is_that_of_leaving_each_row_out():
    generator = np.random.default_rng(1)
    ids = generator.integers(0, 25, 400)
    click = (generator.random(400) < 0.2 + 0.5 * (ids < 6)).astype(np.int64)
    counted, positive, rate = np.bincount(ids), np.bincount(ids, weights=click), click.mean()
    scores = (positive[ids] - click + 10 * rate) / (counted[ids] - 1 + 10)
    wins = [
        0.5 if ids[one] == ids[other] or scores[one] == scores[other] else float(scores[one] > scores[other])
        for one in np.flatnonzero(click == 1)
        for other in np.flatnonzero(click == 0)
    ]
    [auc] = plain({"x": ids, "click": click}, one_feature(Categorical())).columns["x"].label_aucs()
    assert auc == pytest.approx(np.mean(wins), abs=1e-9)


def test_a_feature_that_is_null_exactly_where_the_label_is_0_is_a_leak():
    click = np.random.default_rng(0).integers(0, 2, 1000)
    found = plain({"x": pa.array([1.0 if label else None for label in click]), "click": click}, one_feature(Numeric()))
    assert found.columns["x"].label_aucs() == [pytest.approx(1.0)]


def test_an_auc_needs_both_labels():
    found = plain({"x": [1.0, 2.0], "click": [0, 0]}, one_feature(Numeric()))
    assert math.isnan(found.columns["x"].label_aucs()[0])


def test_the_order_within_a_list_tells_rows_apart():
    schema = Schema(features={"x": MultiCategorical()}, tables={"x": Table(num_embeddings=9)}, labels={"click": Label()})
    found = plain({"x": [[1, 2], [2, 1], [1, 2], [], None], "click": [0, 0, 0, 0, 0]}, schema)
    assert found.all_rows.num_distinct == 3


def test_columns_beyond_features_and_labels_are_read_where_they_are_there():
    assert statistics_columns(SCHEMA, {"date", "place", "other"}) == (*SCHEMA.columns, "place", "date")
    row = dict.fromkeys(TYPES.names) | {"click": 1}
    rows = batch([row]).select([*SCHEMA.columns])
    found = collect([rows], SCHEMA)
    assert (found.rows, found.days, found.newest, found.row_keys, found.segments) == (1, None, None, None, {})
    assert set(found.coverage.values()) == {0.0}


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"statistics\.json: expected statistics of a window.*Fix: train first"):
        read_statistics(tmp_path)
    for text in ("", "[]", '{"format": 0}'):
        (tmp_path / "statistics.json").write_text(text)
        with pytest.raises(DataError, match="expected statistics of a window"):
            read_statistics(tmp_path)
