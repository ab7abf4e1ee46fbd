"""Joins: the same as a loop over the rows, nothing from the future, and every way in which a table does not fit."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import gc
from datetime import UTC, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlenv.config import DataConfig, WindowConfig
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.datasets.transforms.derive import DeriveConfig
from mlenv.datasets.transforms.filter import FilterConfig
from mlenv.datasets.transforms.join import JoinConfig
from mlenv.errors import ConfigError, DataError
from mlenv.schema import Categorical, Label, Numeric, Schema, Table
from mlenv.transforms import Transforms, open_tables

START = datetime.datetime(2026, 1, 1, tzinfo=UTC)
TIMES = pa.timestamp("ms", "UTC")
SMALL = st.sampled_from(["a", "b", "c", None])
MOMENT = st.one_of(st.none(), st.integers(0, 12))
SIDE_ROW = st.tuples(st.one_of(st.none(), st.integers(0, 3)), SMALL, MOMENT)
ROW = st.tuples(st.one_of(st.none(), st.integers(0, 4)), SMALL, MOMENT)


def at(hours):
    return None if hours is None else START + timedelta(hours=hours)


def side_table(rows):
    columns = {
        "user": pa.array([row[0] for row in rows], pa.int32()),
        "place": pa.array([row[1] for row in rows], pa.string()),
        "since": pa.array([at(row[2]) for row in rows], TIMES),
        "value": pa.array(range(len(rows)), pa.int64()),
    }
    return pa.table(columns)


def main_rows(rows):
    columns = {
        "user_id": pa.array([row[0] for row in rows], pa.int64()),
        "place": pa.array([row[1] for row in rows], pa.string()).dictionary_encode(),
        "time": pa.array([at(row[2]) for row in rows], TIMES),
    }
    return pa.RecordBatch.from_pydict(columns)


def write(folder, table, name="table", files=1):
    folder = folder / name
    folder.mkdir()
    cuts = np.linspace(0, len(table), files + 1).astype(int)
    for part in range(files):
        pq.write_table(table.slice(cuts[part], cuts[part + 1] - cuts[part]), folder / f"part-{part}.parquet", row_group_size=3)
    return str(folder)


def joined(config, rows, event_time="time"):
    chain = Transforms(open_tables([config], event_time), (), is_training=True)
    plan = chain.plan(chain.output_schema(rows.schema).names)
    return chain.apply(plan, rows.select(list(plan.stored)))[0]


def by_hand(side, rows, delay, max_age):
    """One row after the other: the last of the rows of the key that were known, in the order of time and then of the file."""
    found = []
    for user, place, time in rows:
        best = None
        for value, (other_user, other_place, since) in enumerate(side):
            if None in (user, place, time, other_user, other_place, since) or (user, place) != (other_user, other_place):
                continue
            if since + delay <= time and (best is None or since >= best[0]):
                best = since, value
        if best is not None and max_age and time - best[0] > max_age:
            best = None
        found.append(None if best is None else best[1])
    return found


@settings(max_examples=150)
@given(
    st.lists(SIDE_ROW, min_size=1, max_size=25),
    st.lists(ROW, max_size=25),
    st.integers(0, 3),
    st.integers(0, 5),
    st.integers(1, 3),
    st.sampled_from([1, 3, 1000]),
)
def test_equals_a_loop_over_the_rows_whatever_the_cut(tmp_path_factory, side, rows, delay, max_age, files, memory_rows):
    table = write(tmp_path_factory.mktemp("join"), side_table(side), files=files)
    config = JoinConfig(
        table=table,
        key=("user_id", "place"),
        table_key=("user", "place"),
        columns=("value",),
        valid_from="since",
        delay=f"{delay}h",
        max_age=f"{max_age}h" if max_age else "",
        memory_rows=memory_rows,
    )
    expected = by_hand(side, rows, delay, max_age)
    assert joined(config, main_rows(rows)).column("value").to_pylist() == expected
    cut = len(rows) // 3
    parts = [joined(config, main_rows(part)).column("value").to_pylist() for part in (rows[:cut], rows[cut:])]
    assert parts[0] + parts[1] == expected


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=20, unique=True),
    st.lists(st.one_of(st.none(), st.integers(-3, 43))),
    st.sampled_from([1, 4, 100]),
)
def test_without_times_each_row_gets_the_row_of_its_key(tmp_path_factory, keys, wanted, memory_rows):
    side = pa.table({"id": keys, "name": [f"n{key}" for key in keys], "tags": [[key] for key in keys]})
    config = JoinConfig(
        table=write(tmp_path_factory.mktemp("join"), side),
        key=("id",),
        columns=("tags", "name"),
        rename={"name": "id_name"},
        memory_rows=memory_rows,
    )
    out = joined(config, pa.RecordBatch.from_pydict({"id": pa.array(wanted, pa.int64())}))
    assert out.schema.names == ["id", "tags", "id_name"]
    assert out.column("id_name").to_pylist() == [f"n{key}" if key in keys else None for key in wanted]
    assert out.column("tags").to_pylist() == [[key] if key in keys else None for key in wanted]


def test_nothing_is_known_a_millisecond_early(tmp_path):
    event, millisecond, day = START + timedelta(days=2), timedelta(milliseconds=1), timedelta(days=1)
    side = pa.table({"user": [1, 2, 3], "since": pa.array([event - day, event - day + millisecond, None], TIMES), "value": [10, 20, 30]})
    config = JoinConfig(table=write(tmp_path, side), key=("user",), columns=("value",), valid_from="since", delay="1d")
    rows = pa.RecordBatch.from_pydict({"user": [1, 2, 3], "time": pa.array([event] * 3, TIMES)})
    assert joined(config, rows).column("value").to_pylist() == [10, None, None]


@pytest.mark.parametrize(("side_unit", "unit"), [("ns", "us"), ("us", "ns"), ("ns", "ns"), ("s", "ms")])
def test_units_of_time_may_differ(tmp_path, side_unit, unit):
    side = pa.table({"user": [1], "since": pa.array([START], pa.timestamp(side_unit, "UTC")), "value": [10]})
    config = JoinConfig(table=write(tmp_path, side), key=("user",), columns=("value",), valid_from="since")
    times = pa.array([START, START - timedelta(milliseconds=1)], pa.timestamp("us", "UTC")).cast(pa.timestamp(unit))
    assert joined(config, pa.RecordBatch.from_pydict({"user": [1, 1], "time": times})).column("value").to_pylist() == [10, None]


def test_of_nanoseconds_the_later_microsecond_counts(tmp_path):
    side = pa.table({"user": [1], "since": pa.array([1], pa.timestamp("ns")), "value": [10]})
    config = JoinConfig(table=write(tmp_path, side), key=("user",), columns=("value",), valid_from="since")
    times = pa.array([0, 999, 1000], pa.timestamp("ns"))
    out = joined(config, pa.RecordBatch.from_pydict({"user": [1, 1, 1], "time": times}))
    assert out.column("value").to_pylist() == [None, None, 10]


@pytest.mark.parametrize("kind", ["text", "date", "folder"])
def test_the_rows_of_a_day_are_known_when_its_aggregate_is_ready(tmp_path, kind):
    """03:00 in Oslo is 01:00 UTC in summer; the clocks go forward on 2026-03-29 at 01:00 UTC."""
    days = ["2026-03-27", "2026-03-28", "2026-07-01"]
    if kind == "folder":
        for value, day in enumerate(days):
            write(tmp_path, pa.table({"user": [1], "value": [value]}), f"date={day}")
        table, valid_from = str(tmp_path), "date"
    else:
        column = pa.array(days) if kind == "text" else pa.array(days).cast(pa.date32())
        table, valid_from = write(tmp_path, pa.table({"user": [1] * 3, "day": column, "value": [0, 1, 2]})), "day"
    config = JoinConfig(table=table, key=("user",), columns=("value",), valid_from=valid_from, ready_at="03:00", time_zone="Europe/Oslo")
    ready = [datetime.datetime(2026, 3, 28, 2), datetime.datetime(2026, 3, 29, 1), datetime.datetime(2026, 7, 2, 1)]
    times = [moment - early for moment in ready for early in (timedelta(milliseconds=1), timedelta())]
    rows = pa.RecordBatch.from_pydict({"user": [1] * 6, "time": pa.array(times, pa.timestamp("ms"))})
    assert joined(config, rows).column("value").to_pylist() == [None, 0, 0, 1, 1, 2]


def test_a_clock_that_skips_or_repeats_an_hour_is_never_early(tmp_path):
    side = pa.table({"user": [1, 2], "day": ["2026-03-28", "2026-10-24"], "value": [1, 2]})
    config = JoinConfig(
        table=write(tmp_path, side), key=("user",), columns=("value",), valid_from="day", ready_at="02:30", time_zone="Europe/Oslo"
    )
    ready = [datetime.datetime(2026, 3, 29, 1, 30), datetime.datetime(2026, 10, 25, 1, 30)]
    for moment, known in ((timedelta(milliseconds=-1), False), (timedelta(), True)):
        rows = pa.RecordBatch.from_pydict({"user": [1, 2], "time": pa.array([one + moment for one in ready], pa.timestamp("ms"))})
        assert joined(config, rows).column("value").to_pylist() == ([1, 2] if known else [None, None])


def test_columns_are_renamed_and_replaced(tmp_path):
    table = write(tmp_path, pa.table({"user": [1], "age": [40]}))
    rows = pa.RecordBatch.from_pydict({"user": [1, 2], "age": ["old", "old"]})
    with pytest.raises(ConfigError, match=r"data\.transforms\[0\]\.columns: expected columns that the data do not have.*'age'"):
        joined(JoinConfig(table=table, key=("user",), columns=("age",)), rows)
    replaced = joined(JoinConfig(table=table, key=("user",), columns=("age",), replace=("age",)), rows)
    assert replaced.to_pydict() == {"user": [1, 2], "age": [40, None]}
    renamed = joined(JoinConfig(table=table, key=("user",), columns=("age",), rename={"age": "years"}), rows)
    assert renamed.column("years").to_pylist() == [40, None]


def test_later_transforms_use_what_was_joined_and_a_join_that_nobody_reads_is_left_out(tmp_path):
    table = write(tmp_path, pa.table({"user": [1, 2], "age": [40, 10]}))
    transforms = [
        DeriveConfig(column="user", sql="text_user::BIGINT"),
        JoinConfig(table=table, key=("user",), columns=("age",)),
        FilterConfig(where="age >= 18"),
        JoinConfig(table=table, key=("user",), columns=("age",), rename={"age": "unread"}),
    ]
    chain = Transforms(open_tables(transforms, ""), (), is_training=True)
    rows = pa.RecordBatch.from_pydict({"text_user": ["1", "2", "3"]})
    assert chain.output_schema(rows.schema).names == ["text_user", "user", "age", "unread"]
    plan = chain.plan(["user"])
    assert [place for place, _ in plan.steps] == [0, 1, 2]
    assert chain.apply(plan, rows)[0].to_pydict() == {"user": [1]}


def test_windows_share_a_table_that_did_not_change(tmp_path):
    table = write(tmp_path, pa.table({"user": [1], "age": [40]}))
    config = JoinConfig(table=table, key=("user",), columns=("age",))
    first = config.open("")
    assert config.open("") is first
    pq.write_table(pa.table({"user": [1, 2], "age": [40, 1]}), f"{table}/part-1.parquet")
    assert config.open("") is not first
    assert config.open("").fingerprint != first.fingerprint
    del first
    gc.collect()


def test_a_process_opens_the_table_itself(tmp_path):
    config = JoinConfig(table=write(tmp_path, pa.table({"user": [1], "age": [40]})), key=("user",), columns=("age",))
    rows = pa.RecordBatch.from_pydict({"user": [1, 2]})
    join = config.open("")
    expected = join.apply(rows, ())
    make, arguments = join.__reduce__()
    assert copy.copy(join) is join  # shared within a process
    del join
    gc.collect()
    assert make(*arguments).apply(rows, ()).equals(expected)


SIDE = pa.table({"user": [1, 2], "place": ["a", "b"], "since": pa.array([START, START], TIMES), "number": [1.0, 2.0], "age": [40, 1]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": ("usr",)}, r"\.key: expected columns of .*Received: 'usr'\. Fix: did you mean 'user'"),
        ({"key": ("user_id",), "table_key": ("usr",)}, r"\.table_key: expected columns of .*did you mean 'user'"),
        ({"key": ("usr_id",), "table_key": ("user",)}, r"\.key: expected columns of the data\. Received: 'usr_id'.*'user_id'"),
        ({"columns": ("agee",)}, r"\.columns: expected columns of .*did you mean 'age'"),
        ({"valid_from": "sinse"}, r"\.valid_from: expected columns of .*did you mean 'since'"),
        ({"valid_from": "age"}, r"\.valid_from: expected a column of timestamps or days\. Received: 'age, which is int64'"),
        ({"valid_from": "since", "as_of": "user_id"}, r"\.as_of: expected a column of timestamps or days.*CAST\(user_id \* 1000"),
        ({"valid_from": "since", "as_of": "tme"}, r"\.as_of: expected columns of the data.*did you mean 'time'"),
        (
            {"key": ("text",), "table_key": ("user",)},
            r"\.key: expected a key of the type that the table has, user: int64\. Received: 'text: string'.*CAST\(text AS BIGINT\)",
        ),
        ({"key": ("user_id",), "table_key": ("place",)}, r"\.key: .*CAST\(user_id AS VARCHAR\)"),
        ({"key": ("number",)}, r"\.key: expected columns of integers, texts, booleans or times"),
        ({"replace": ("age",)}, r"\.replace: expected columns of the data\. Received: 'age'"),
    ],
)
def test_columns_that_do_not_fit_are_refused_before_any_row(tmp_path, options, message):
    settings = {"table": write(tmp_path, SIDE), "key": ("user_id",), "columns": ("age",)} | options
    if "table_key" not in settings and settings["key"] == ("user_id",):
        settings["table_key"] = ("user",)
    rows = pa.RecordBatch.from_pydict({"user_id": [1], "text": ["1"], "number": [1.0], "time": pa.array([START], TIMES)})
    with pytest.raises(ConfigError, match=r"data\.transforms\[0\]" + message):
        joined(JoinConfig(**settings), rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": ""}, r"table: expected a table"),
        ({"key": ()}, r"key: expected at least one column"),
        ({"columns": ()}, r"columns: expected at least one column"),
        ({"table_key": ("a", "b")}, r"table_key: expected 1 columns"),
        ({"rename": {"b": "c"}}, r"rename\.b: expected one of columns"),
        ({"columns": ("a", "b"), "rename": {"b": "a"}}, r"columns: expected columns with names of their own"),
        ({"replace": ("b",)}, r"replace: expected columns that the join writes"),
        ({"delay": "3h"}, r"delay: expected nothing without valid_from"),
        ({"as_of": "t"}, r"as_of: expected nothing without valid_from"),
        ({"valid_from": "t", "delay": "3 hours"}, r"delay: expected a length of time"),
        ({"valid_from": "t", "max_age": "-1d"}, r"max_age: expected a length of time"),
        ({"valid_from": "t", "ready_at": "25:00"}, r"ready_at: expected a time of day"),
        ({"valid_from": "t", "ready_at": "03:00", "delay": "1h"}, r"ready_at: expected nothing beside delay"),
        ({"time_zone": "Europe/Olso"}, r"time_zone: expected a time zone"),
        ({"min_match_rate": 1.5}, r"min_match_rate: expected a number in \[0, 1\]"),
        ({"memory_rows": 0}, r"memory_rows: expected a number >= 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        JoinConfig(**({"table": "t", "key": ("k",), "columns": ("a",)} | options))


def test_a_join_by_time_needs_the_time_of_the_event(tmp_path):
    config = JoinConfig(table=write(tmp_path, SIDE), key=("user",), columns=("age",), valid_from="since")
    with pytest.raises(ConfigError, match=r"as_of: expected the time of the event, here or in schema\.event_time"):
        open_tables([config], "")


@pytest.mark.parametrize("memory_rows", [2, 100])
def test_a_key_with_several_rows_is_named_with_its_files(tmp_path, memory_rows):
    side = pa.table({"user": [1, 2, None, None, 3, 2], "age": range(6)})
    config = JoinConfig(table=write(tmp_path, side, files=2), key=("user",), columns=("age",), memory_rows=memory_rows)
    message = r"part-0\.parquet and .*part-1\.parquet: expected one row for each user\. Received: 'several for user 2'.*valid_from"
    with pytest.raises(DataError, match=message):
        joined(config, pa.RecordBatch.from_pydict({"user": [1]}))


def test_tables_that_cannot_be_read(tmp_path):
    options = {"key": ("user",), "columns": ("age",)}
    with pytest.raises(DataError, match=r"gone: expected Parquet files of a table\. Received: 'nothing there'"):
        JoinConfig(table=str(tmp_path / "gone"), **options).open("")
    with pytest.raises(ConfigError, match=r"table: expected a local path, or a URL"):
        JoinConfig(table="nowhere://bucket/table", **options).open("")
    with pytest.raises(DataError, match=r"empty: expected a table with rows"):
        JoinConfig(table=write(tmp_path, SIDE.slice(0, 0), "empty"), **options).open("")
    table = write(tmp_path, SIDE)
    pq.write_table(pa.table({"user": [5]}), f"{table}/part-1.parquet")
    with pytest.raises(DataError, match=r"part-1\.parquet, column 'age': expected a column of this name"):
        JoinConfig(table=table, **options).open("")
    pq.write_table(pa.table({"user": [5], "age": ["x"]}), f"{table}/part-1.parquet")
    with pytest.raises(DataError, match=r"part-1\.parquet: expected columns of the types"):
        JoinConfig(table=table, **options).open("")
    (tmp_path / "table" / "part-1.parquet").write_bytes(b"no Parquet")
    with pytest.raises(DataError, match=r"part-1\.parquet: expected a whole Parquet file"):
        JoinConfig(table=table, **options).open("")
    text = write(tmp_path, pa.table({"user": [1], "day": ["yesterday"], "age": [1]}), "text")
    late = JoinConfig(table=text, valid_from="day", **options)
    with pytest.raises(DataError, match=r"column 'day': expected timestamps, or days as YYYY-MM-DD"):
        joined(late, pa.RecordBatch.from_pydict({"user": [1], "time": pa.array([START], TIMES)}))


SCHEMA = Schema(
    features={"item": Categorical(), "clicks": Numeric(default=None)},
    tables={"item": Table(num_embeddings=1000, embedding_dim=2)},
    labels={"click": Label(teacher="teacher")},
    row_key=("key",),
    event_time="time",
)


@pytest.fixture
def data(tmp_path):
    """Two days of ten rows, row n at n hours of its day; users 0 to 4."""
    for day in range(2):
        folder = tmp_path / "data" / f"date=2026-01-0{day + 1}"
        folder.mkdir(parents=True)
        keys = np.arange(10) + 10 * day
        times = pa.array([START + timedelta(days=day, hours=hour) for hour in range(10)], TIMES)
        rows = pa.table({"key": keys, "item": keys, "user": keys % 5, "time": times, "click": (keys % 2).astype(np.int8)})
        pq.write_table(rows, folder / "part-0.parquet", row_group_size=4)
    return tmp_path


def source(folder, *transforms, extras=("metadata", "teacher"), **options):
    config = DataConfig(path=str(folder / "data"), train=WindowConfig(), transforms=transforms, batch_size=20)
    return ParquetSource(config, WindowConfig(), SCHEMA, is_training=True, extras=extras, **options)


def joins_of(folder, **options):
    """A teacher's predictions by row key, and a feature of users that is known six hours after midnight."""
    predictions = pa.table({"key": np.arange(5, 20), "prediction": np.linspace(0, 1, 15).astype(np.float32)})
    features = pa.table({"user": np.arange(4), "day": ["2026-01-01"] * 4, "clicks": [10.0, 11.0, 12.0, 13.0]})
    tables = [write(folder, predictions, "predictions", files=2), write(folder, features, "features")]
    return (
        JoinConfig(table=tables[0], key=("key",), columns=("prediction",), rename={"prediction": "teacher"}),
        JoinConfig(table=tables[1], key=("user",), columns=("clicks",), valid_from="day", delay="6h", **options),
    )


def test_a_source_reads_a_teacher_and_a_feature_that_are_joined(data):
    (batch,) = source(data, *joins_of(data)).batches()
    keys = batch.metadata.column("key").to_numpy()
    expected = np.where(keys >= 5, (keys - 5) / 14, np.nan)
    np.testing.assert_allclose(batch.teacher[:, 0].numpy(), expected, rtol=1e-6)
    known = np.where((keys % 10 >= 6) | (keys >= 10), keys % 5, 4) < 4
    np.testing.assert_array_equal(np.nan_to_num(batch.dense[:, 0].numpy()), np.where(known, 10 + keys % 5, 0))


def test_what_the_joins_find_is_told_by_day(data):
    teacher, feature = source(data, *joins_of(data)).joins.values()
    assert (teacher["rows"], teacher["matched"], teacher["match_rate"]) == (20, 15, 0.75)
    assert {day: one["matched"] for day, one in teacher["days"].items()} == {"2026-01-01": 5, "2026-01-02": 10}
    assert "staleness_hours" not in teacher
    hours = [key if key < 10 else key + 14 for key in [6, 7, 8, *range(10, 20)] if key % 5 < 4]
    assert feature["matched"] == len(hours)
    for name, share in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
        expected = np.quantile(hours, share, method="inverted_cdf")
        assert feature["staleness_hours"][name] == pytest.approx(expected, rel=0.02)


def test_too_few_matches_are_refused_with_keys(data):
    joins = joins_of(data, min_match_rate=0.9)
    message = (
        r"data\.transforms\[1\]\.\S*features: expected at least 90\.0% of the rows of all days to find a row, min_match_rate\. "
        r"Received: '55\.0%; nothing for user 0 or user 1 or user 2'"
    )
    with pytest.raises(DataError, match=message):
        _ = source(data, *joins).joins


@pytest.mark.parametrize("memory_rows", [1, 3])
def test_a_table_beyond_the_memory_is_joined_on_the_disk(data, memory_rows):
    joins = joins_of(data)
    (expected,) = (one := source(data, *joins)).batches()
    on_disk = [dataclasses.replace(join, memory_rows=memory_rows) for join in joins]
    (batch,) = (other := source(data, *on_disk)).batches()
    np.testing.assert_array_equal(batch.teacher.numpy(), expected.teacher.numpy())
    np.testing.assert_array_equal(batch.dense.numpy(), expected.dense.numpy())
    assert other.joins == one.joins


def test_a_table_that_changes_changes_the_fingerprint_of_the_data(data):
    joins = joins_of(data)
    before = source(data, *joins).fingerprint
    assert source(data, *joins).fingerprint == before
    pq.write_table(pa.table({"user": [4], "day": ["2026-01-01"], "clicks": [1.0]}), data / "features" / "part-1.parquet")
    assert source(data, *joins).fingerprint != before
