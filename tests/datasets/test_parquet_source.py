from __future__ import annotations

import dataclasses
from itertools import pairwise

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mlenv.batch import Position
from mlenv.config import DataConfig, WindowConfig
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.datasets.workers import ThreadsConfig
from mlenv.errors import ConfigError, DataError, Problems
from mlenv.schema import Categorical, Label, MultiCategorical, Numeric, Schema, Table

SCHEMA = Schema(
    features={"item": Categorical(), "tags": MultiCategorical(), "x": Numeric()},
    tables={"item": Table(num_embeddings=1000, embedding_dim=2), "tags": Table(num_embeddings=9, embedding_dim=2)},
    labels={"click": Label()},
    row_key=("key",),
    segments=("date",),
)
ROWS, DAYS, GROUP = 130, 3, 40


def day(number, **changes):
    generator = np.random.default_rng(number)
    columns = {
        "key": np.arange(ROWS) + number * ROWS,
        "item": generator.integers(0, 1000, ROWS),
        "tags": pa.array([generator.integers(0, 9, size).tolist() for size in generator.integers(0, 4, ROWS)], pa.list_(pa.int64())),
        "x": (np.arange(ROWS) + number * ROWS).astype(np.float32),
        "click": generator.integers(0, 2, ROWS),
        "unused": ["ignored"] * ROWS,
    }
    return pa.table(columns | changes)


@pytest.fixture
def folder(tmp_path):
    for number in range(DAYS):
        (tmp_path / f"date=2026-01-0{number + 1}").mkdir()
        pq.write_table(day(number), tmp_path / f"date=2026-01-0{number + 1}" / "part-0.parquet", row_group_size=GROUP)
    return tmp_path


def source(folder, window=None, schema=SCHEMA, extras=("metadata",), **options):
    data = {"batch_size": 32, "shuffle_rows": 50} | {
        key: options.pop(key) for key in ("batch_size", "shuffle_rows", "workers") if key in options
    }
    config = DataConfig(path=str(folder), train=WindowConfig(), **data)
    return ParquetSource(config, window or WindowConfig(), schema, extras=extras, **options)


def keys(batches):
    return [key for batch in batches for key in batch.metadata.column("key").to_pylist()]


def test_rows_come_in_file_order_with_their_day(folder):
    reader = source(folder)
    batches = list(reader.batches())
    assert keys(batches) == list(range(DAYS * ROWS))
    assert [len(batch) for batch in batches] == [32] * 12 + [6]
    assert batches[0].metadata.column("date").to_pylist() == ["2026-01-01"] * 32
    assert torch.equal(torch.cat([batch.dense[:, 0] for batch in batches]), torch.arange(DAYS * ROWS).float())
    assert (reader.num_rows, reader.num_batches, reader.days) == (390, 13, ("2026-01-01", "2026-01-02", "2026-01-03"))


def test_a_window_reads_its_days_only(folder):
    reader = source(folder, WindowConfig(start="2026-01-02", end="2026-01-02"))
    assert keys(reader.batches()) == list(range(ROWS, 2 * ROWS))
    file = source(folder, WindowConfig(path="date=2026-01-03/part-0.parquet"), shuffle=False)
    assert file.num_rows == ROWS


def test_shuffled_rows_are_all_there_in_another_order_each_epoch(folder):
    seen = keys(source(folder, shuffle=True, num_epochs=2, seed=5).batches())
    assert len(seen) == 2 * DAYS * ROWS
    first, second = seen[: DAYS * ROWS], seen[DAYS * ROWS :]
    assert sorted(first) == sorted(second) == list(range(DAYS * ROWS))
    assert first != second
    assert first != sorted(first)
    assert seen == keys(source(folder, shuffle=True, num_epochs=2, seed=5, workers=ThreadsConfig(num_threads=1)).batches())
    assert seen != keys(source(folder, shuffle=True, num_epochs=2, seed=6).batches())


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_source_continues_exactly_where_any_batch_ended(folder, shuffle):
    options = {"shuffle": shuffle, "num_epochs": 2, "seed": 1}
    batches = list(source(folder, **options).batches())
    for place, batch in enumerate(batches):
        rest = list(source(folder, **options).batches(batch.position))
        assert keys(rest) == keys(batches[place + 1 :])
        assert [follower.position for follower in rest] == [follower.position for follower in batches[place + 1 :]]
    assert batches[0].position != Position()


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_the_rows_out(folder, world_size, shuffle):
    parts = [keys(source(folder, shuffle=shuffle, rank=rank, world_size=world_size).batches()) for rank in range(world_size)]
    together = sorted(key for part in parts for key in part)
    assert together == list(range(DAYS * ROWS))
    assert all(parts)


REQUESTS = dataclasses.replace(SCHEMA, request="request")
WITH_REQUESTS = {"schema": REQUESTS, "extras": ("metadata", "requests")}


def write_requests(folder):
    """Requests of one to seven rows, some over the border of two row groups; every eleventh row has none."""
    requests = np.repeat(np.arange(DAYS * ROWS), np.random.default_rng(0).integers(1, 8, DAYS * ROWS))[: DAYS * ROWS]
    for number in range(DAYS):
        own = [None if row % 11 == 0 else int(requests[row]) for row in range(number * ROWS, (number + 1) * ROWS)]
        file = folder / f"date=2026-01-0{number + 1}" / "part-0.parquet"
        pq.write_table(day(number, request=pa.array(own, pa.int64() if number else pa.float64())), file, row_group_size=GROUP)
    return requests


def test_rows_of_a_request_stay_together(folder):
    requests = write_requests(folder)
    reader = source(folder, shuffle=True, shuffle_rows=10_000, **WITH_REQUESTS)  # all rows in one window
    batches = list(reader.batches())
    seen = keys(batches)
    assert sorted(seen) == list(range(DAYS * ROWS))
    assert seen == keys(source(folder, shuffle=True, shuffle_rows=10_000, **WITH_REQUESTS).batches())
    assert seen != keys(source(folder, shuffle=True, shuffle_rows=10_000, seed=1, **WITH_REQUESTS).batches())
    runs = [-1 - key if key % 11 == 0 else requests[key] for key in seen]
    distinct = list(dict.fromkeys(runs))
    places = [runs.index(run) for run in distinct]
    assert all(runs[place : place + runs.count(run)] == [run] * runs.count(run) for run, place in zip(distinct, places, strict=True))
    named = [run for run in distinct if run >= 0]
    assert named != sorted(named)
    for run in distinct:  # row groups come in a random order; what one of them holds of a request stays as it was
        rows_of_run = [key for key, own in zip(seen, runs, strict=True) if own == run]
        group_of = {key: (key // ROWS, key % ROWS // GROUP) for key in rows_of_run}
        assert all(first < then for first, then in pairwise(rows_of_run) if group_of[first] == group_of[then])
    for batch in batches:
        stored = [f"none {row}" if value is None else value for row, value in enumerate(batch.metadata.column("request").to_pylist())]
        same = torch.tensor([[one == other for other in stored] for one in stored])
        assert torch.equal(batch.requests.unsqueeze(0) == batch.requests.unsqueeze(1), same)


def test_a_source_of_whole_requests_continues_and_is_shared_out(folder):
    write_requests(folder)
    options = {"shuffle": True, "num_epochs": 2, "seed": 1} | WITH_REQUESTS
    batches = list(source(folder, **options).batches())
    for place in range(0, len(batches), 5):
        rest = list(source(folder, **options).batches(batches[place].position))
        assert keys(rest) == keys(batches[place + 1 :])
        assert all(torch.equal(batch.requests, other.requests) for batch, other in zip(rest, batches[place + 1 :], strict=True))
    parts = [keys(source(folder, **(options | {"num_epochs": 1}), rank=rank, world_size=2).batches()) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(DAYS * ROWS))


def test_extras_leave_the_order_of_files_and_of_plain_shuffling_alone(folder):
    write_requests(folder)
    assert keys(source(folder, **WITH_REQUESTS).batches()) == list(range(DAYS * ROWS))
    plain = keys(source(folder, shuffle=True).batches())
    assert keys(source(folder, shuffle=True, schema=REQUESTS).batches()) == plain
    labels = {"click": Label(teacher="x")}
    with pytest.raises(DataError, match=r"column 'x': expected a prediction in \[0, 1\]\. Received: 2\.0\."):
        list(source(folder, schema=dataclasses.replace(SCHEMA, labels=labels), extras=["teacher"]).batches())


def test_requests_need_their_column(folder):
    with pytest.raises(ConfigError, match=r"schema\.request: expected the column"):
        source(folder, extras=["requests"])
    with pytest.raises(Problems, match=r"column 'request': expected a column of this name"):
        source(folder, **WITH_REQUESTS)


def test_any_fsspec_url_can_be_read(folder):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/set", recursive=True)
    assert keys(source("memory://set").batches()) == list(range(DAYS * ROWS))
    memory.rm("/set", recursive=True)
    with pytest.raises(ConfigError, match=r"data\.path"):
        source("nothing://set")


def test_the_fingerprint_follows_the_files(folder):
    before = source(folder).fingerprint
    assert source(folder).fingerprint == before
    pq.write_table(day(7), folder / "date=2026-01-02" / "part-1.parquet")
    assert source(folder).fingerprint != before


def test_a_wrong_value_is_found_in_its_file(folder):
    items = np.zeros(ROWS, np.int64)
    items[81] = 1007
    pq.write_table(day(1, item=items), folder / "date=2026-01-02" / "part-0.parquet", row_group_size=GROUP)
    for shuffle in (False, True):
        with pytest.raises(DataError) as caught:
            list(source(folder, shuffle=shuffle).batches())
        assert str(caught.value).endswith(
            "date=2026-01-02/part-0.parquet, row group 2, row 1, column 'item': expected an id in [0, 1000). "
            "Received: 1007. Fix: raise num_embeddings of table 'item', or set its out_of_range to 'hash'."
        )


def test_columns_are_checked_before_any_row_is_read(folder):
    pq.write_table(day(1, item=["a"] * ROWS).drop_columns(["x"]), folder / "date=2026-01-02" / "part-0.parquet")
    with pytest.raises(Problems) as caught:
        source(folder)
    assert "2 problems" in str(caught.value)
    assert "date=2026-01-02/part-0.parquet, column 'x': expected a column of this name" in str(caught.value)
    assert "column 'item': expected int64. Received: 'string'" in str(caught.value)


def test_a_truncated_file_is_named(folder):
    file = folder / "date=2026-01-03" / "part-0.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"part-0\.parquet: expected a whole Parquet file"):
        source(folder)


def test_a_damaged_page_is_named(folder):
    file = folder / "date=2026-01-03" / "part-0.parquet"
    content = bytearray(file.read_bytes())
    start = (
        pq.read_metadata(file).row_group(1).column(1).dictionary_page_offset
        or pq.read_metadata(file).row_group(1).column(1).data_page_offset
    )
    content[start : start + 12] = b"\xff" * 12
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"part-0\.parquet, row group 1: expected readable pages"):
        list(source(folder).batches())


def test_windows_and_folders_without_data_are_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"expected Parquet files in 2026-02-01 to latest. Received: 'days 2026-01-01 to 2026-01-03'"):
        source(folder, WindowConfig(start="2026-02-01"))
    with pytest.raises(DataError, match=r"missing: expected a folder of Parquet files"):
        source(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: expected Parquet files"):
        source(tmp_path / "empty")


def test_files_of_one_window_may_store_a_column_differently(folder):
    narrow = day(1, item=pa.array(np.arange(ROWS), pa.int16()))
    pq.write_table(narrow, folder / "date=2026-01-02" / "part-0.parquet", row_group_size=GROUP)
    reader = source(folder, shuffle=True, shuffle_rows=10_000)
    assert sorted(keys(reader.batches())) == list(range(DAYS * ROWS))


def test_labels_and_pass_through_columns_may_drift_too(folder):
    drifted = day(1, click=pa.array([True] * ROWS), key=pa.array(np.arange(ROWS) + ROWS, pa.int32()))
    pq.write_table(drifted, folder / "date=2026-01-02" / "part-0.parquet", row_group_size=GROUP)
    batches = list(source(folder).batches())
    assert keys(batches) == list(range(DAYS * ROWS))
    assert {str(batch.metadata.schema.field("key").type) for batch in batches} == {"int64"}
    pq.write_table(day(1, key=["a"] * ROWS), folder / "date=2026-01-02" / "part-0.parquet")
    with pytest.raises(DataError, match=r"date=2026-01-02/part-0\.parquet, column 'key': expected int64\. Received: 'string'"):
        source(folder)


def test_unfinished_files_are_passed_over(folder):
    (folder / "date=2026-01-02" / "_temporary").mkdir()
    pq.write_table(day(1), folder / "date=2026-01-02" / "_temporary" / "part-0.parquet")
    pq.write_table(day(1), folder / "date=2026-01-02" / ".part-1.parquet")
    assert source(folder).num_rows == DAYS * ROWS


def test_a_reader_that_is_dropped_stops_its_threads(folder):
    import threading

    before = set(threading.enumerate())  # what other tests have left behind is theirs
    batches = source(folder).batches()
    next(batches)
    batches.close()
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("decode"):
            thread.join(timeout=5)
            assert not thread.is_alive()


def test_a_sample_for_statistics_comes_from_all_over_the_window(folder):
    whole = [rows.num_rows for rows in source(folder).record_batches(("key",))]
    sample = [int(rows.column("key")[0].as_py()) for rows in source(folder).record_batches(("key",), at_most=100)]
    assert sum(whole) == ROWS * DAYS
    assert sample == [0, 120, 250]  # row groups 0, 3 and 7 of twelve
    assert [rows.num_rows for rows in source(folder).record_batches(("key",), at_most=10_000)] == whole
    assert len(list(source(folder).record_batches(("key",), at_most=1))) == 1
