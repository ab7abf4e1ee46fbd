"""The Parquet source with transforms, with missing days and with files that cannot be read."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlenv.config import DataConfig, WindowConfig
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.datasets.transforms.deduplicate import DeduplicateConfig
from mlenv.datasets.transforms.derive import DeriveConfig
from mlenv.datasets.transforms.filter import FilterConfig
from mlenv.datasets.transforms.sampling import SampleConfig, SampleNegativesConfig
from mlenv.datasets.transforms.stratify import StratifyConfig
from mlenv.datasets.workers import ThreadsConfig
from mlenv.errors import DataError, Problems
from mlenv.schema import Categorical, Label, Numeric, Schema, Table

SCHEMA = Schema(
    features={"item": Categorical(), "x": Numeric()},
    tables={"item": Table(num_embeddings=1000, embedding_dim=2)},
    labels={"click": Label()},
    row_key=("key",),
)
ROWS, DAYS, GROUP = 130, 3, 40


def day(number, **changes):
    generator = np.random.default_rng(number)
    columns = {
        "key": np.arange(ROWS) + number * ROWS,
        "item": generator.integers(0, 1000, ROWS),
        "x": (np.arange(ROWS) + number * ROWS).astype(np.float32),
        "click": (generator.random(ROWS) < 0.3).astype(np.int8),
        "age": generator.integers(0, 90, ROWS),
    }
    return pa.table(columns | changes)


def write(folder, number, table, group=GROUP):
    (folder / f"date=2026-01-0{number + 1}").mkdir(exist_ok=True)
    file = folder / f"date=2026-01-0{number + 1}" / "part-0.parquet"
    pq.write_table(table, file, row_group_size=group)
    return file


@pytest.fixture
def folder(tmp_path):
    for number in range(DAYS):
        write(tmp_path, number, day(number))
    return tmp_path


def source(folder, *transforms, window=None, schema=SCHEMA, extras=("metadata",), data=None, **options):
    settings = {"batch_size": 32, "shuffle_rows": 50} | (data or {})
    config = DataConfig(path=str(folder), train=WindowConfig(), transforms=transforms, **settings)
    return ParquetSource(config, window or WindowConfig(), schema, extras=extras, **({"is_training": True} | options))


def keys(batches):
    return [key for batch in batches for key in batch.metadata.column("key").to_pylist()]


def stored(folder):
    return [row for file in sorted(folder.rglob("*.parquet")) for row in pq.read_table(file, partitioning=None).to_pylist()]


SAMPLED = (FilterConfig(where="age >= 18"), SampleNegativesConfig(negative="click = 0", rate=0.25))


def test_rows_come_out_as_the_transforms_leave_them(folder):
    schema = dataclasses.replace(
        SCHEMA,
        features={**SCHEMA.features, "is_old": Numeric(), "is_first_day": Numeric()},
        labels={"click": Label(weight="weight"), "either": Label()},
    )
    transforms = (
        FilterConfig(where="age >= 18"),
        DeriveConfig(column="is_old", sql="age > 60"),
        DeriveConfig(column="is_first_day", sql="date = '2026-01-01'"),
        DeriveConfig(column="weight", sql="1 + click"),
        DeriveConfig(column="either", sql="CASE WHEN click = 1 OR is_old THEN 1 ELSE 0 END"),
    )
    reader = source(folder, *transforms, schema=schema)
    batches = list(reader.batches())
    expected = [row for row in stored(folder) if row["age"] >= 18]
    assert keys(batches) == [row["key"] for row in expected]
    assert (reader.num_rows, reader.num_batches) == (len(expected), len(batches))
    assert np.concatenate([batch.dense for batch in batches]).tolist() == [
        [row["x"], row["age"] > 60, row["key"] < ROWS] for row in expected
    ]
    assert np.concatenate([batch.weights[:, 0] for batch in batches]).tolist() == [1 + row["click"] for row in expected]
    assert np.concatenate([batch.labels[:, 1] for batch in batches]).tolist() == [
        float(row["click"] or row["age"] > 60) for row in expected
    ]
    found = pa.Table.from_batches(reader.record_batches(("is_old", "key")))
    assert found.to_pylist() == [{"is_old": row["age"] > 60, "key": row["key"]} for row in expected]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_rows_stay_on_any_number_of_ranks_and_threads(folder, world_size, threads):
    whole = keys(source(folder, *SAMPLED).batches())
    readers = [
        source(folder, *SAMPLED, shuffle=True, rank=rank, world_size=world_size, data={"workers": ThreadsConfig(num_threads=threads)})
        for rank in range(world_size)
    ]
    parts = [list(reader.batches()) for reader in readers]
    assert sorted(key for part in parts for key in keys(part)) == sorted(whole)
    assert [len(part) for part in parts] == [reader.num_batches for reader in readers]
    assert {reader.num_rows for reader in readers} == {len(whole)}
    assert 0 < len(whole) < DAYS * ROWS / 2


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_source_continues_exactly_where_any_batch_ended(folder, shuffle):
    write(folder, 1, day(1, age=np.zeros(ROWS)))  # a day of which nothing stays
    transforms = (*SAMPLED, DeduplicateConfig(columns=("item",)))
    options = {"shuffle": shuffle, "num_epochs": 2, "seed": 1, "data": {"batch_size": 7}}
    batches = list(source(folder, *transforms, **options).batches())
    assert len(batches) == source(folder, *transforms, **options).num_batches
    for place, batch in enumerate(batches):
        rest = list(source(folder, *transforms, **options).batches(batch.position))
        assert keys(rest) == keys(batches[place + 1 :])
        assert [follower.position for follower in rest] == [follower.position for follower in batches[place + 1 :]]


DRAWN = {
    "sample": SampleConfig(column="click", rates={"1": 0.7, "0": 0.3}, seed=2),
    "sample_negatives": SampleNegativesConfig(negative="click = 0", rate=0.4, weight_column="weight"),
    "stratify": StratifyConfig(columns=("click",), shares={"0": 0.5, "1": 0.5}, weight_column="weight"),
    "deduplicate": DeduplicateConfig(columns=("item", "age")),
}


@pytest.mark.parametrize("kind", DRAWN)
@settings(max_examples=25)
@given(
    st.permutations(range(60)),
    st.lists(st.integers(1, 59), max_size=3),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
)
def test_the_fate_of_a_row_hangs_on_no_cut(tmp_path_factory, kind, order, cuts, group, world_size, threads, shuffle):
    """Files, row groups, ranks, threads and, but for which of equal rows is the first, the order."""
    generator = np.random.default_rng(0)
    rows = {"key": np.arange(60), "item": generator.integers(0, 5, 60), "age": generator.integers(0, 3, 60)}
    table = pa.table(rows | {"x": np.zeros(60), "click": generator.integers(0, 2, 60)})
    folder = tmp_path_factory.mktemp("cut")
    (folder / "whole").mkdir()
    (folder / "cut").mkdir()
    ordered = table if kind == "deduplicate" else table.take(pa.array(order))
    pq.write_table(table, folder / "whole/part.parquet")
    for number, (start, stop) in enumerate(pairwise(sorted({0, 60, *cuts}))):
        pq.write_table(ordered.slice(start, stop - start), folder / f"cut/part-{number}.parquet", row_group_size=group)
    schema = dataclasses.replace(SCHEMA, labels={"click": Label(weight="weight")}) if "weight" in DRAWN[kind].writes else SCHEMA
    whole = rows_read(source(folder / "whole", DRAWN[kind], schema=schema))
    readers = [
        source(
            folder / "cut",
            DRAWN[kind],
            schema=schema,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            data={"workers": ThreadsConfig(num_threads=threads)},
        )
        for rank in range(world_size)
    ]
    assert sorted(row for reader in readers for row in rows_read(reader)) == sorted(whole)
    if kind == "deduplicate":
        pq.write_table(table.take(pa.array(order)), folder / "whole/part.parquet")
        assert len(rows_read(source(folder / "whole", DRAWN[kind]))) == len(whole)


def rows_read(reader):
    """Key and weight of each row."""
    return [(key, weight) for batch in reader.batches() for key, weight in zip(keys([batch]), batch.weights[:, 0].tolist(), strict=True)]


def test_held_out_rows_are_filtered_but_not_sampled(folder):
    reader = source(folder, *SAMPLED, is_training=False)
    assert keys(reader.batches()) == [row["key"] for row in stored(folder) if row["age"] >= 18]


def test_the_first_of_equal_rows_stays_wherever_they_are(folder):
    columns = {"item": np.arange(ROWS) % 50, "age": np.full(ROWS, 20)}
    write(folder, 0, day(0, **columns))
    write(folder, 2, day(2, **(columns | {"item": pa.array(columns["item"], pa.int16())})))
    reader = source(folder, FilterConfig(where="key <> 3"), DeduplicateConfig(columns=("item", "age")), shuffle=True)
    expected = {}
    for row in stored(folder):
        if row["key"] != 3:
            expected.setdefault((row["item"], row["age"]), row["key"])
    assert sorted(keys(reader.batches())) == sorted(expected.values())
    assert reader.num_rows == len(expected)


def test_a_wrong_value_is_found_in_its_row_of_the_file(folder):
    items = np.zeros(ROWS, np.int64)
    items[81] = 1007
    ages = np.full(ROWS, 30)
    ages[80] = 3
    write(folder, 1, day(1, item=items, age=ages))
    with pytest.raises(DataError, match=r"date=2026-01-02/part-0\.parquet, row group 2, row 1, column 'item': expected an id"):
        list(source(folder, FilterConfig(where="age >= 18")).batches())


def test_an_expression_that_fails_on_rows_names_its_file(folder):
    write(folder, 1, day(1, age=["x"] * ROWS))
    write(folder, 0, day(0, age=["1"] * ROWS))
    write(folder, 2, day(2, age=["1"] * ROWS))
    reader = source(folder, FilterConfig(where="CAST(age AS INT) > 0"))
    with pytest.raises(
        DataError, match=r"date=2026-01-02/part-0\.parquet, row group 0, data\.transforms\[0\]\.where: expected rows on which"
    ):
        list(reader.batches())


def test_transforms_are_checked_against_every_file_before_any_row_is_read(folder):
    with pytest.raises(Problems) as caught:
        source(folder, FilterConfig(where="aeg >= 18"))
    assert "1 problem." in str(caught.value)
    assert "date=2026-01-01/part-0.parquet, data.transforms[0].where: expected columns of the data. Received: 'aeg'" in str(caught.value)
    assert "did you mean 'age'" in str(caught.value)
    write(folder, 1, day(1, age=["a"] * ROWS))
    with pytest.raises(
        Problems, match=r"date=2026-01-02/part-0\.parquet, data\.transforms\[0\]\.where: expected an expression of matching"
    ):
        source(folder, FilterConfig(where="age >= 18"))


def test_what_a_transform_makes_must_fit_the_schema(folder):
    with pytest.raises(Problems, match=r"column 'x': expected a number. Received: 'large_string'"):
        source(folder, DeriveConfig(column="x", sql="'a'"))


def test_files_may_store_what_is_read_differently(folder):
    expected = keys(source(folder, *SAMPLED).batches())
    table = day(1)
    drifted = day(1, key=pa.array(table["key"].to_numpy(), pa.int32()), age=table["age"].to_numpy().astype(np.float64), more=["new"] * ROWS)
    write(folder, 1, drifted)
    assert keys(source(folder, *SAMPLED).batches()) == expected


def test_a_window_of_which_nothing_stays_is_named(folder):
    with pytest.raises(DataError, match=r"expected rows that data\.transforms leave in all days\. Received: 'none'"):
        _ = source(folder, FilterConfig(where="age > 1000")).num_batches


def test_the_fingerprint_follows_the_transforms(folder):
    plain = source(folder).fingerprint
    one, other = (source(folder, SampleConfig(default_rate=rate)).fingerprint for rate in (0.5, 0.6))
    assert len({plain, one, other}) == 3
    assert source(folder, SampleConfig(default_rate=0.5)).fingerprint == one


def test_a_day_without_rows_is_missed(folder):
    whole = WindowConfig(start="2026-01-01", end="2026-01-03")
    write(folder, 1, day(1).slice(0, 0))
    message = r"expected rows on every day of 2026-01-01 to 2026-01-03\. Received: 'no rows on 2026-01-02'\. Fix: .*skip_dates"
    with pytest.raises(DataError, match=message):
        source(folder, window=whole)
    with pytest.raises(DataError, match=r"no rows on 2026-01-02'"):
        source(folder)
    (folder / "date=2026-01-02" / "part-0.parquet").unlink()
    for window, data in ((dataclasses.replace(whole, skip_dates=("2026-01-02",)), None), (whole, {"allow_missing_days": True})):
        reader = source(folder, window=window, data=data)
        assert (reader.num_rows, reader.days) == (2 * ROWS, ("2026-01-01", "2026-01-03"))
    with pytest.raises(DataError, match=r"no rows on 2025-12-01, .* and 21 more days"):
        source(folder, window=WindowConfig(start="2025-12-01", end="2026-01-01"))


def test_days_that_are_skipped_are_not_read(folder):
    reader = source(folder, window=WindowConfig(skip_dates=("2026-01-02",)))
    assert reader.days == ("2026-01-01", "2026-01-03")


def damage(file, row_group):
    content = bytearray(file.read_bytes())
    column = pq.read_metadata(file).row_group(row_group).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 12] = b"\xff" * 12
    file.write_bytes(content)


SKIP = {"on_bad_file": "skip", "max_bad_row_groups": 1}


def test_a_row_group_that_cannot_be_read_may_be_passed_over(folder, caplog):
    file = folder / "date=2026-01-02" / "part-0.parquet"
    whole = source(folder, data=SKIP).fingerprint
    damage(file, 1)
    with pytest.raises(DataError, match=r"part-0\.parquet, row group 1: expected readable pages"):
        list(source(folder).batches())
    options = {"shuffle": True, "num_epochs": 2, "data": SKIP}
    batches = list(source(folder, **options).batches())
    reader = source(folder, **options)
    assert "passed over" in caplog.text
    assert reader.skipped == (f"{file}, row group 1, 40 rows",)
    assert sorted(keys(batches)) == sorted(2 * [key for key in range(DAYS * ROWS) if not 170 <= key < 210])
    assert (reader.num_rows, reader.num_batches) == (DAYS * ROWS - GROUP, len(batches))
    assert reader.fingerprint != whole
    for place in range(0, len(batches), 4):
        assert keys(source(folder, **options).batches(batches[place].position)) == keys(batches[place + 1 :])


def test_no_more_is_passed_over_than_allowed(folder):
    damage(folder / "date=2026-01-02" / "part-0.parquet", 1)
    broken = folder / "date=2026-01-03" / "part-1.parquet"
    broken.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"part-1\.parquet: expected a whole Parquet file"):
        source(folder)
    reader = source(folder, data=SKIP)
    with pytest.raises(DataError, match=r"expected at most 1 row groups that cannot be read, data\.max_bad_row_groups"):
        _ = reader.num_rows
    reader = source(folder, data=SKIP | {"max_bad_row_groups": 2})
    assert reader.num_rows == DAYS * ROWS - GROUP
    assert len(reader.skipped) == 2


def test_rows_can_be_counted_by_the_names_of_folders_alone(folder):
    reader = source(folder, FilterConfig(where="date <> '2026-01-01'"))
    assert reader.num_rows == 2 * ROWS
    assert keys(reader.batches()) == [row["key"] for row in stored(folder) if row["key"] >= ROWS]


def test_a_folder_that_is_no_day_is_not_missed(folder):
    write(folder, 1, day(1)).parent.rename(folder / "date=unknown")
    reader = source(folder, data={"allow_missing_days": True})
    assert reader.num_rows == DAYS * ROWS
    with pytest.raises(DataError, match="no rows on 2026-01-02"):
        source(folder)


def test_a_constant_is_written_to_every_row_of_a_file(folder):
    reader = source(folder, DeriveConfig(column="x", sql="2"))
    assert {float(value) for batch in reader.batches() for value in batch.dense[:, 0]} == {2.0}
