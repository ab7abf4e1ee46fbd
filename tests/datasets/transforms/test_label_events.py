"""Labels from events: the same as a loop over rows and events, nothing known early, and every way in which a table does not fit."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import gc
import json
from datetime import UTC, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlenv import compose, train
from mlenv.config import DataConfig, WindowConfig
from mlenv.datasets.backfill import backfill
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.datasets.simulated_ads import SimulationConfig, simulate
from mlenv.datasets.transforms.derive import DeriveConfig
from mlenv.datasets.transforms.filter import FilterConfig
from mlenv.datasets.transforms.label_events import LabelEventsConfig
from mlenv.errors import ConfigError, DataError, Problems
from mlenv.schema import Categorical, Label, Schema, Table
from mlenv.transforms import Transforms, open_tables

START = datetime.datetime(2026, 1, 1, tzinfo=UTC)
TIMES = pa.timestamp("us", "UTC")
ALL = {"column": "label", "mask_column": "known", "count_column": "events", "delay_column": "delay", "sums": {"price": "revenue"}}
HOUR = st.one_of(st.none(), st.integers(0, 15))
KEY = st.one_of(st.none(), st.integers(0, 3))
PLACE = st.sampled_from(["a", "b", None])
EVENT = st.tuples(KEY, PLACE, HOUR, st.sampled_from(["purchase", "cart", None]), st.one_of(st.none(), st.integers(0, 9)))
ROW = st.tuples(KEY, PLACE, HOUR)


def at(hours):
    return None if hours is None else START + timedelta(hours=hours)


def events_table(events):
    keys, places, hours, kinds, prices = zip(*events, strict=True) if events else ((),) * 5
    columns = {
        "user": pa.array(keys, pa.int32()),
        "place": pa.array(places, pa.string()),
        "happened": pa.array(map(at, hours), pa.timestamp("ms", "UTC")),
        "kind": pa.array(kinds, pa.string()),
        "price": pa.array(prices, pa.float32()),
    }
    return pa.table(columns)


def main_rows(rows):
    keys, places, hours = zip(*rows, strict=True) if rows else ((),) * 3
    columns = {
        "user_id": pa.array(keys, pa.int64()),
        "place": pa.array(places, pa.string()).dictionary_encode(),
        "time": pa.array(map(at, hours), TIMES),
    }
    return pa.RecordBatch.from_pydict(columns)


def write(folder, table, name="events", files=1):
    folder = folder / name
    folder.mkdir()
    cuts = np.linspace(0, len(table), files + 1).astype(int)
    for part in range(files):
        pq.write_table(table.slice(cuts[part], cuts[part + 1] - cuts[part]), folder / f"part-{part}.parquet", row_group_size=3)
    return str(folder)


def labelled(config, rows, event_time="time"):
    chain = Transforms(open_tables([config], event_time), (), is_training=True)
    schema = chain.output_schema(rows.schema)
    plan = chain.plan(schema.names)
    out = chain.apply(plan, rows.select(list(plan.stored)))[0]
    assert out.schema.types == schema.types
    return out


def by_hand(events, rows, window, wait, until, touches=None):
    """One row after the other: label, mask, number, seconds to the first, sum. No later touch of the key lies before the event."""
    out = []
    for key, place, hour in rows:
        if None in (key, place, hour) or hour + window + wait > until:
            out.append((None, False, None, None, None))
            continue
        found = [
            (event[2], event[4] or 0)
            for event in events
            if event[:2] == (key, place)
            and event[2] is not None
            and hour <= event[2] <= hour + window
            and event[3] == "purchase"
            and not any(touch[:2] == (key, place) and touch[2] is not None and hour < touch[2] <= event[2] for touch in touches or ())
        ]
        delay = min(found)[0] - hour if found else None
        out.append((int(bool(found)), True, len(found), None if delay is None else delay * 3600.0, float(sum(price for _, price in found))))
    return out


@settings(max_examples=200)
@given(
    events=st.lists(EVENT, max_size=30),
    rows=st.lists(ROW, max_size=25),
    window=st.integers(0, 6),
    wait=st.integers(0, 3),
    until=st.one_of(st.none(), st.integers(0, 22)),
    memory_rows=st.sampled_from([1, 4, 100]),
    files=st.integers(1, 3),
)
def test_equals_a_loop_over_rows_and_events(tmp_path_factory, events, rows, window, wait, until, memory_rows, files):
    newest = max((event[2] for event in events if event[2] is not None), default=None)
    config = LabelEventsConfig(
        table=write(tmp_path_factory.mktemp("events"), events_table(events), files=files),
        key=("user_id", "place"),
        table_key=("user", "place"),
        time="happened",
        where="kind = 'purchase'",
        window=f"{window}h",
        wait=f"{wait}h" if wait else "",
        complete_until="" if until is None else at(until).isoformat(),
        memory_rows=memory_rows,
        **ALL,
    )
    if until is None and newest is None:
        with pytest.raises(DataError, match="complete_until"):
            labelled(config, main_rows(rows))
        return
    expected = by_hand(events, rows, window, wait, newest if until is None else until)
    out = labelled(config, main_rows(rows))
    assert list(zip(*(out.column(name).to_pylist() for name in config.writes), strict=True)) == expected
    cut = len(rows) // 3
    parts = [labelled(config, main_rows(part)).to_pylist() for part in (rows[:cut], rows[cut:])]
    assert parts[0] + parts[1] == out.to_pylist()
    kept = labelled(dataclasses.replace(config, mask_column=""), main_rows(rows))
    assert kept.to_pylist() == out.filter(out.column("known")).drop_columns("known").to_pylist()


@settings(max_examples=100)
@given(
    events=st.lists(EVENT, max_size=30), rows=st.lists(ROW, max_size=25), window=st.integers(0, 9), memory_rows=st.sampled_from([1, 4, 100])
)
def test_the_last_touch_gets_the_event_whatever_part_of_the_rows_is_read(tmp_path_factory, events, rows, window, memory_rows):
    folder = tmp_path_factory.mktemp("touches")
    touches = pa.Table.from_batches([main_rows(rows)])
    config = LabelEventsConfig(
        table=write(folder, events_table(events)),
        touches=write(folder, touches, "rows", files=2),
        key=("user_id", "place"),
        table_key=("user", "place"),
        time="happened",
        where="kind = 'purchase'",
        window=f"{window}h",
        complete_until=at(12).isoformat(),
        memory_rows=memory_rows,
        **ALL,
    )
    cut = len(rows) // 2
    for part in (rows, rows[:cut], rows[cut:]):
        out = labelled(config, main_rows(part))
        expected = by_hand(events, part, window, 0, 12, touches=rows)
        assert list(zip(*(out.column(name).to_pylist() for name in config.writes), strict=True)) == expected


def test_the_table_of_touches_counts_and_is_checked(tmp_path):
    table = write(tmp_path, happened(pa.array([START + timedelta(hours=2)], TIMES)))
    rows = row_at(START, START + timedelta(hours=1))
    touches = write(tmp_path, pa.Table.from_batches([rows]), "touches")
    labels = LabelEventsConfig(**options(table, touches=touches)).open("time")
    assert labels.apply(rows, ()).column("label").to_pylist() == [0, 1]
    make, arguments = labels.__reduce__()
    assert make(*arguments).apply(rows, ()).column("label").to_pylist() == [0, 1]
    pq.write_table(pa.Table.from_batches([row_at(START + timedelta(minutes=90))]), f"{touches}/part-1.parquet")
    changed = LabelEventsConfig(**options(table, touches=touches)).open("time")
    assert changed.fingerprint != labels.fingerprint
    assert changed.apply(rows, ()).column("label").to_pylist() == [0, 0]
    with pytest.raises(ConfigError, match=r"touches\.as_of: expected columns of .*did you mean 'time'"):
        LabelEventsConfig(**options(table, touches=touches)).open("tim")


def options(table="t", **others):
    return {"table": table, "key": ("user",), "time": "happened", "window": "24h", "complete_until": "2026-02-01"} | ALL | others


def happened(times, **columns):
    return pa.table({"user": [1] * len(times), "happened": times, "price": [1.0] * len(times)} | columns)


def row_at(*times, kind=TIMES):
    return pa.RecordBatch.from_pydict({"user": [1] * len(times), "time": pa.array(times, kind)})


def test_both_ends_of_the_window_count_and_nothing_beyond(tmp_path):
    config = LabelEventsConfig(**options(write(tmp_path, happened(pa.array([START], TIMES)))))
    day, tick = timedelta(days=1), timedelta(microseconds=1)
    rows = row_at(START + tick, START, START - tick, START - day + tick, START - day, START - day - tick)
    out = labelled(config, rows)
    assert out.column("label").to_pylist() == [0, 1, 1, 1, 1, 0]
    assert out.column("delay").to_pylist() == [None, 0.0, 1e-6, 86400 - 1e-6, 86400.0, None]


def test_a_row_is_known_from_the_moment_on_and_a_found_event_does_not_change_that(tmp_path):
    table = write(tmp_path, happened(pa.array([START, START + timedelta(days=3)], TIMES)))
    config = LabelEventsConfig(**options(table, complete_until="", wait="12h"))  # the newest event: 72 hours
    tick, last = timedelta(microseconds=1), START + timedelta(hours=36)
    out = labelled(config, row_at(START, last, last + tick, START + timedelta(days=3)))
    assert out.column("known").to_pylist() == [True, True, False, False]
    assert out.column("label").to_pylist() == [1, 0, None, None]
    assert out.column("events").to_pylist() == [1, 0, None, None]


def test_a_moment_may_have_a_zone(tmp_path):
    table = write(tmp_path, happened(pa.array([START], TIMES)))
    for moment, known in (("2026-01-02T01:00:00+01:00", True), ("2026-01-02T00:59:59.999999+01:00", False), ("2026-01-02", True)):
        assert labelled(LabelEventsConfig(**options(table, complete_until=moment)), row_at(START)).column("known").to_pylist() == [known]


@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Oslo"])
@pytest.mark.parametrize(("unit", "row_unit"), [("ns", "ns"), ("ns", "ms"), ("s", "ns"), ("us", "us")])
def test_units_and_zones_of_time_may_differ(tmp_path, zone, unit, row_unit):
    instants = pa.array([START, START + timedelta(hours=1)], TIMES).cast(pa.timestamp(unit, "UTC"))
    naive_or_zoned = instants.cast(pa.timestamp(unit, zone)) if zone else instants.cast(pa.int64()).cast(pa.timestamp(unit))
    config = LabelEventsConfig(**options(write(tmp_path, happened(naive_or_zoned)), window="30m"))
    rows = row_at(START, START + timedelta(seconds=1), START + timedelta(minutes=30), kind=pa.timestamp(row_unit, "Asia/Tokyo"))
    assert labelled(config, rows).column("delay").to_pylist() == [0.0, None, 1800.0]


def test_nanoseconds_count_as_their_microsecond(tmp_path):
    config = LabelEventsConfig(**options(write(tmp_path, happened(pa.array([5_500], pa.timestamp("ns")))), window="1ms"))
    rows = pa.RecordBatch.from_pydict({"user": [1] * 3, "time": pa.array([5_000, 5_999, 6_000], pa.timestamp("ns"))})
    assert labelled(config, rows).column("label").to_pylist() == [1, 1, 0]


def test_a_table_without_events_needs_a_moment(tmp_path):
    table = write(tmp_path, happened(pa.array([START], TIMES)).slice(0, 0))
    out = labelled(LabelEventsConfig(**options(table)), row_at(START))
    assert out.column("label").to_pylist() == [0]
    with pytest.raises(DataError, match=r"expected a table with rows.*complete_until"):
        LabelEventsConfig(**options(table, complete_until="")).open("time")
    nothing = write(tmp_path, happened(pa.array([None], TIMES)), "nothing")
    with pytest.raises(DataError, match=r"expected events with a time in happened.*complete_until"):
        labelled(LabelEventsConfig(**options(nothing, complete_until="")), row_at(START))


def test_events_of_another_kind_tell_up_to_when_the_table_is_complete(tmp_path):
    times = pa.array([START, START + timedelta(days=1)], TIMES)
    table = write(tmp_path, happened(times, kind=["purchase", "cart"]))
    config = LabelEventsConfig(**options(table, complete_until="", where="kind = 'purchase'"))
    assert labelled(config, row_at(START)).column("label").to_pylist() == [1]


def test_columns_are_replaced_only_when_they_are_named(tmp_path):
    table = write(tmp_path, happened(pa.array([START], TIMES)))
    rows = row_at(START).append_column("label", pa.array([0]))
    with pytest.raises(ConfigError, match=r"\[0\]\.column: expected columns that the data do not have.*'label'.*name it in replace"):
        labelled(LabelEventsConfig(**options(table)), rows)
    assert labelled(LabelEventsConfig(**options(table, replace=("label",))), rows).column("label").to_pylist() == [1]


def test_windows_share_what_they_hold_and_a_process_opens_the_table_itself(tmp_path):
    table = write(tmp_path, happened(pa.array([START], TIMES)))
    config = LabelEventsConfig(**options(table))
    labels = config.open("time")
    assert config.open("time") is labels
    assert config.open("other") is not labels
    expected = labels.apply(row_at(START), ())
    make, arguments = labels.__reduce__()
    assert copy.copy(labels) is labels  # shared within a process
    before = labels.fingerprint
    del labels
    gc.collect()
    assert make(*arguments).apply(row_at(START), ()).equals(expected)
    pq.write_table(happened(pa.array([START], TIMES)), f"{table}/part-1.parquet")
    assert config.open("time").fingerprint != before


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"key": ("usr",)}, r"key: expected columns of .*did you mean 'user'"),
        ({"key": ("text",), "table_key": ("user",)}, r"key: expected a key of the type that the table has.*CAST\(text AS BIGINT\)"),
        ({"time": "happened_"}, r"time: expected columns of .*did you mean 'happened'"),
        ({"time": "price"}, r"time: expected a column of timestamps\. Received: 'price, which is double'"),
        ({"time": "day"}, r"time: expected a column of timestamps\. Received: 'day, which is date32"),
        ({"as_of": "tme"}, r"as_of: expected columns of the data.*did you mean 'time'"),
        ({"as_of": "user"}, r"as_of: expected a column of timestamps"),
        ({"where": "knd = 'a'"}, r"where: expected columns of .*'knd'"),
        ({"where": "price + 1"}, r"where: expected an expression that is true or false"),
        ({"sums": {"prise": "revenue"}}, r"sums\.prise: expected columns of .*did you mean 'price'"),
        ({"sums": {"kind": "revenue"}}, r"sums\.kind: expected a column of numbers\. Received: 'kind, which is string'"),
    ],
)
def test_columns_that_do_not_fit_are_refused_before_any_row(tmp_path, others, message):
    day = pa.array([20_000], pa.int32()).cast(pa.date32())
    config = LabelEventsConfig(**options(write(tmp_path, happened(pa.array([START], TIMES), kind=["a"], day=day)), **others))
    rows = row_at(START).append_column("text", pa.array(["1"]))
    with pytest.raises(ConfigError, match=r"data\.transforms\[0\]\." + message):
        labelled(config, rows)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"table": ""}, r"table: expected a value"),
        ({"column": ""}, r"column: expected a value"),
        ({"time": ""}, r"time: expected a value"),
        ({"window": ""}, r"window: expected a value"),
        ({"key": ()}, r"key: expected at least one column"),
        ({"table_key": ("a", "b")}, r"table_key: expected 1 columns"),
        ({"window": "a day"}, r"window: expected a length of time"),
        ({"wait": "-1h"}, r"wait: expected a length of time"),
        ({"complete_until": "yesterday"}, r"complete_until: expected a moment as 2026"),
        ({"where": "kind ="}, r"where: expected an SQL expression"),
        ({"where": "happened < now()"}, r"where: expected an expression that gives the same tomorrow"),
        ({"mask_column": "label"}, r"column: expected columns with names of their own"),
        ({"replace": ("other",)}, r"replace: expected columns that are written"),
        ({"memory_rows": 0}, r"memory_rows: expected a number >= 1"),
    ],
)
def test_wrong_options_are_refused(others, message):
    with pytest.raises(ConfigError, match=message):
        LabelEventsConfig(**options(**others))


def test_labels_need_the_time_of_the_row(tmp_path):
    config = LabelEventsConfig(**options(write(tmp_path, happened(pa.array([START], TIMES)))))
    with pytest.raises(ConfigError, match=r"as_of: expected the time of the row, here or in schema\.event_time"):
        open_tables([config], "")


SCHEMA = Schema(
    features={"item": Categorical()},
    tables={"item": Table(num_embeddings=1000, embedding_dim=2)},
    labels={"label": Label(mask="known")},
    row_key=("item",),
    event_time="time",
)


@pytest.fixture
def data(tmp_path):
    """Two days of ten rows, row n at n hours of its day; an event two hours after each third row, the last at 23 hours of day 2."""
    rows = [START + timedelta(days=day, hours=hour) for day in range(2) for hour in range(10)]
    for day in range(2):
        folder = tmp_path / "data" / f"date=2026-01-0{day + 1}"
        folder.mkdir(parents=True)
        items = np.arange(10) + 10 * day
        part = pa.table({"item": items, "time": pa.array(rows[10 * day : 10 * day + 10], TIMES)})
        pq.write_table(part, folder / "part-0.parquet", row_group_size=4)
    events = {"item": [*range(0, 20, 3), -1], "happened": pa.array([*(one + timedelta(hours=2) for one in rows[::3]), at(47)], TIMES)}
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    return tmp_path


def config_of(folder, *transforms, **others):
    return DataConfig(path=str(folder), train=WindowConfig(), transforms=transforms, batch_size=20, **others)


def labels_of(folder, **others):
    settings = {"key": ("item",), "time": "happened", "column": "label", "window": "3h", "wait": "15h", "mask_column": "known"}
    return LabelEventsConfig(table=str(folder / "events.parquet"), **(settings | others))


def test_a_source_masks_or_leaves_out_what_is_not_known(data):
    """Known until 47 - 3 - 15 = 29 hours: day 1 and the first six rows of day 2."""
    source = ParquetSource(config_of(data / "data", labels_of(data)), WindowConfig(), SCHEMA, is_training=True)
    (batch,) = source.batches()
    known, is_third = np.arange(20) < 16, np.arange(20) % 3 == 0
    np.testing.assert_array_equal(batch.weights[:, 0].numpy(), known)
    np.testing.assert_array_equal(batch.labels[:, 0].numpy(), known & is_third)
    plain = dataclasses.replace(SCHEMA, labels={"label": Label()})
    fewer = ParquetSource(config_of(data / "data", labels_of(data, mask_column="")), WindowConfig(), plain, is_training=True)
    (batch,) = fewer.batches()
    assert fewer.num_rows == 16
    np.testing.assert_array_equal(batch.labels[:, 0].numpy(), is_third[:16])
    assert fewer.joins == source.joins
    assert fewer.fingerprint != source.fingerprint


def test_what_was_found_is_told_by_day(data):
    source = ParquetSource(config_of(data / "data", labels_of(data)), WindowConfig(), SCHEMA, is_training=True)
    (found,) = source.joins.values()
    assert (found["rows"], found["unknown"], found["matched"], found["match_rate"]) == (20, 4, 6, 6 / 16)
    assert {day: (one["unknown"], one["matched"]) for day, one in found["days"].items()} == {"2026-01-01": (0, 4), "2026-01-02": (4, 2)}
    assert found["delay_hours"]["p50"] == pytest.approx(2, rel=0.02)
    assert found["complete_until"] == "2026-01-02T23:00:00+00:00"


def test_labels_are_backfilled_and_rows_that_would_leave_are_refused(data):
    derived = DeriveConfig(column="copy", sql='"item" + 0')
    labels = labels_of(data, key=("copy",), table_key=("item",), count_column="events")
    config = config_of(data / "data", FilterConfig(where='"item" > 5'), derived, labels)
    assert backfill(config, SCHEMA, data / "out") == 20
    names = ("item", "label", "known", "events")
    sources = [ParquetSource(one, WindowConfig(), SCHEMA) for one in (config_of(data / "data", derived, labels), config_of(data / "out"))]
    expected, written = ([row for rows in one.record_batches(names) for row in rows.to_pylist()] for one in sources)
    assert written == expected
    with pytest.raises(ConfigError, match=r"data\.transforms\[0\]: expected a transform that leaves every row in.*mask_column"):
        backfill(config_of(data / "data", labels_of(data, mask_column="")), SCHEMA, data / "other")


EXPERIMENT = """
name: events
output: {output}
schema:
  row_key: [impression_id]
  event_time: event_time
  features: {{item_id: {{kind: categorical}}}}
  tables: {{item_id: {{num_embeddings: 500, embedding_dim: 4}}}}
  labels: {{conversion: {{{label}}}}}
data:
  path: {path}
  batch_size: 500
  train: {{end: 2026-01-03}}
  test: {{start: 2026-01-05, end: 2026-01-05}}
  label_wait_days: {wait}
  transforms: [{transforms}]
model: {{kind: ranker}}
loop: {{log_every_steps: 1}}
tracking: {{enabled: false}}
"""
FROM_EVENTS = (
    "{{kind: label_events, table: '{events}', key: [impression_id], time: conversion_time, column: conversion,"
    " replace: [conversion], window: 12h, wait: 1h{more}}}"
)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A simulated log, and its conversions as a table of events."""
    folder = tmp_path_factory.mktemp("log")
    simulate(SimulationConfig(num_days=6, rows_per_day=1500, num_users=100, num_items=50), folder / "ads")
    rows = pa.concat_tables(
        pq.ParquetFile(file).read(["impression_id", "conversion_time"]) for file in sorted((folder / "ads").rglob("*.parquet"))
    )
    pq.write_table(rows.filter(rows["conversion_time"].is_valid()), folder / "conversions.parquet")
    return folder


def composed(log, tmp_path, output, transforms, label="", wait=1):
    file = tmp_path / f"{output}.yaml"
    file.write_text(EXPERIMENT.format(output=tmp_path / output, path=log / "ads", transforms=transforms, label=label, wait=wait))
    return compose(file)


def from_events(log, more=", mask_column: known"):
    return FROM_EVENTS.format(events=log / "conversions.parquet", more=more)


def test_a_training_on_events_is_that_on_the_label_made_of_the_same_conversions(log, tmp_path):
    hours = "conversion_time IS NOT NULL AND conversion_time <= event_time + INTERVAL '12 hours'"
    derived = train(composed(log, tmp_path, "derived", f'{{kind: derive, column: conversion, sql: "{hours}"}}'))
    events = train(composed(log, tmp_path, "events", from_events(log), "mask: known"))
    assert events.evaluation.metrics == derived.evaluation.metrics
    curves = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("derived", "events")]
    losses = [[line["train/conversion/loss"] for line in curve if "train/conversion/loss" in line] for curve in curves]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 9
    found = json.loads((tmp_path / "events" / "joins.json").read_text())["train"]["data.transforms[0]"]
    assert found["unknown"] == 0
    assert 0 < found["match_rate"] < 0.2


def test_a_config_is_refused_whose_label_may_be_null_or_comes_too_late(log, tmp_path):
    with pytest.raises(
        Problems, match=r"schema\.labels\.conversion\.mask: expected a column.*set it to known, or take out data\.transforms\[0\]"
    ):
        composed(log, tmp_path, "unmasked", from_events(log))
    composed(log, tmp_path, "dropped", from_events(log, ""))
    with pytest.raises(
        Problems, match=r"data\.label_wait_days: expected at least 1, because data\.transforms\[0\] knows a label only then.*set it to 1"
    ):
        composed(log, tmp_path, "early", from_events(log, ""), wait=0)
