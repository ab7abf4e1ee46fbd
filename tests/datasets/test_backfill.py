"""A data set written with its joined columns is what the joins give in memory, however small the buckets."""

from __future__ import annotations

import datetime
from datetime import UTC, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlenv.config import DataConfig, WindowConfig
from mlenv.datasets.backfill import backfill
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.datasets.transforms.derive import DeriveConfig
from mlenv.datasets.transforms.join import JoinConfig
from mlenv.datasets.transforms.sampling import SampleConfig
from mlenv.errors import ConfigError, DataError
from mlenv.schema import Categorical, Label, Schema, Table

START = datetime.datetime(2026, 1, 1, tzinfo=UTC)
TIMES = pa.timestamp("us", "UTC")
SCHEMA = Schema(
    features={"item": Categorical()},
    tables={"item": Table(num_embeddings=1000, embedding_dim=2)},
    labels={"click": Label()},
    row_key=("item",),
    event_time="time",
)


def times(hours):
    return pa.array([None if hour is None else START + timedelta(hours=int(hour)) for hour in hours], TIMES)


def write_data(folder, users, hours, group):
    """Rows in two days, and a file of another data set beside them."""
    cut = len(users) // 2
    for day, part in enumerate((slice(0, cut), slice(cut, None))):
        count = len(users[part])
        rows = {
            "item": np.arange(count) + 500 * day,
            "user": pa.array(users[part], pa.int64()),
            "time": times(hours[part]),
            "click": np.arange(count) % 2,
        }
        (folder / f"date=2026-01-0{day + 1}").mkdir(parents=True)
        pq.write_table(pa.table(rows), folder / f"date=2026-01-0{day + 1}" / "part.parquet", row_group_size=group)


def config_of(folder, *transforms, **windows):
    return DataConfig(path=str(folder), transforms=transforms, **({"train": WindowConfig(), "allow_missing_days": True} | windows))


def rows_of(config, columns):
    reader = ParquetSource(config, config.train, SCHEMA)
    return [row for batch in reader.record_batches(columns) for row in batch.to_pylist()]


@settings(max_examples=25)
@given(
    side=st.lists(
        st.tuples(st.one_of(st.none(), st.integers(0, 9)), st.one_of(st.none(), st.integers(0, 20))), min_size=1, max_size=40
    ).filter(lambda side: any(None not in row for row in side)),
    rows=st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 11)), st.one_of(st.none(), st.integers(0, 20))), min_size=2, max_size=40),
    memory_rows=st.integers(1, 12),
    group=st.integers(1, 7),
)
def test_buckets_give_what_memory_gives(tmp_path_factory, side, rows, memory_rows, group):
    folder = tmp_path_factory.mktemp("backfill")
    write_data(folder / "data", [row[0] for row in rows], [row[1] for row in rows], group)
    table = {
        "user": pa.array([row[0] for row in side], pa.int32()),
        "since": times(row[1] for row in side),
        "value": [f"v{number}" for number in range(len(side))],
        "seen": [[number] * (number % 3) for number in range(len(side))],
    }
    pq.write_table(pa.table(table), folder / "side.parquet", row_group_size=5)
    options = {"table": str(folder / "side.parquet"), "key": ("user",), "columns": ("value", "seen"), "valid_from": "since", "delay": "2h"}
    config = config_of(folder / "data", JoinConfig(**options))
    columns = ("item", "user", "time", "click", "value", "seen")
    expected = rows_of(config, columns)
    cut = config_of(folder / "data", JoinConfig(**options, memory_rows=memory_rows))
    assert backfill(cut, SCHEMA, folder / "out") == len(rows)
    assert rows_of(config_of(folder / "out"), columns) == expected
    for file in (folder / "data").rglob("*.parquet"):
        before, after = (pq.read_metadata(at) for at in (file, folder / "out" / file.relative_to(folder / "data")))
        sizes = [[one.row_group(index).num_rows for index in range(one.num_row_groups)] for one in (before, after)]
        assert sizes[0] == sizes[1]
    assert sorted(path.name for path in folder.iterdir()) == ["data", "out", "side.parquet"]


def chained(folder, **options):
    """The key of the first join is derived, that of the second is a column of the first."""
    pq.write_table(pa.table({"id": [0, 1, 2, 3], "city": ["a", "b", None, "a"]}), folder / "users.parquet")
    pq.write_table(pa.table({"name": ["b", "a"], "size": [7, 5]}), folder / "cities.parquet")
    return (
        SampleConfig(default_rate=0.9),
        DeriveConfig(column="double", sql='"user" * 2'),
        JoinConfig(table=str(folder / "users.parquet"), key=("double",), table_key=("id",), columns=("city",), **options),
        JoinConfig(table=str(folder / "cities.parquet"), key=("city",), table_key=("name",), columns=("size",), **options),
    )


@pytest.mark.parametrize("memory_rows", [1, 100])
def test_joins_of_joins_and_of_derived_keys(tmp_path, memory_rows):
    write_data(tmp_path / "data", [0, 1, 2, None, 3, 0], range(6), 2)
    transforms = chained(tmp_path, memory_rows=memory_rows)
    assert backfill(config_of(tmp_path / "data", *transforms), SCHEMA, tmp_path / "out") == 6
    stored = pq.ParquetFile(tmp_path / "out" / "date=2026-01-01" / "part.parquet").read()
    assert stored.schema.names == ["item", "user", "time", "click", "city", "size"]
    assert stored.select(["user", "city", "size"]).to_pydict() == {"user": [0, 1, 2], "city": ["a", None, None], "size": [5, None, None]}
    later = config_of(tmp_path / "out", *transforms[:2])
    before = config_of(tmp_path / "data", *chained(tmp_path))
    columns = ("item", "double", "city", "size")
    assert rows_of(later, columns) == rows_of(before, columns)


def test_only_the_days_of_the_windows_are_written(tmp_path):
    write_data(tmp_path / "data", [0, 1, 2, 3], range(4), 2)
    windows = {"train": WindowConfig(start="2026-01-02", end="2026-01-02")}
    assert backfill(config_of(tmp_path / "data", *chained(tmp_path), **windows), SCHEMA, tmp_path / "out") == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["date=2026-01-02"]
    both = windows | {"test": WindowConfig(start="2026-01-01", end="2026-01-01"), "validation": WindowConfig()}
    assert backfill(config_of(tmp_path / "data", *chained(tmp_path), **both), SCHEMA, tmp_path / "both") == 4


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    write_data(tmp_path / "data", [0, 1, 2, 3], range(4), 2)
    transforms = chained(tmp_path, memory_rows=1)
    config = config_of(tmp_path / "data", *transforms)
    with pytest.raises(ConfigError, match=r"data\.transforms: expected a transform that reads a table"):
        backfill(config_of(tmp_path / "data"), SCHEMA, tmp_path / "out")
    with pytest.raises(DataError, match=r"expected an output folder inside an existing one"):
        backfill(config, SCHEMA, tmp_path / "no" / "out")
    replacing = JoinConfig(**vars(transforms[2]) | {"replace": ("city",)})
    touched = config_of(tmp_path / "data", transforms[1], DeriveConfig(column="city", sql="'x'"), replacing)
    with pytest.raises(ConfigError, match=r"data\.transforms\[2\]\.columns: expected columns that no transform before it touches"):
        backfill(touched, SCHEMA, tmp_path / "out")
    weight = SampleConfig(default_rate=1.0, weight_column="weight")
    derived = DeriveConfig(column="double", sql="weight::BIGINT")
    with pytest.raises(ConfigError, match=r"data\.transforms\[2\]\.key: .*weight, which a sampler writes"):
        backfill(config_of(tmp_path / "data", weight, derived, transforms[2]), SCHEMA, tmp_path / "out")
    few = JoinConfig(**vars(transforms[2]) | {"min_match_rate": 0.9})
    with pytest.raises(DataError, match=r"users\.parquet: expected at least 90\.0% of the rows of all windows to find a row"):
        backfill(config_of(tmp_path / "data", transforms[1], few), SCHEMA, tmp_path / "out")
    pq.write_table(pa.table({"id": [0, 1, 1], "city": ["a", "b", "c"]}), tmp_path / "users.parquet")
    with pytest.raises(DataError, match=r"users\.parquet: expected one row for each id\. Received: 'several for id 1'"):
        backfill(config, SCHEMA, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cities.parquet", "data", "users.parquet"]
