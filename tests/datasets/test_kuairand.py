from __future__ import annotations

import gzip
import os
from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mlenv.composition import from_plain
from mlenv.config import DataConfig, WindowConfig
from mlenv.datasets.csv_table import ID, read_csv
from mlenv.datasets.kuairand import USER_COLUMNS, USERS, VIDEO_COLUMNS, VIDEOS, convert_kuairand, convert_kuairand_log
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.datasets.transforms.derive import DeriveConfig
from mlenv.datasets.transforms.join import JoinConfig
from mlenv.errors import DataError
from mlenv.schema import Schema

REPO = Path(__file__).parents[2]
SCHEMA = REPO / "examples" / "kuairand" / "schema.yaml"
REAL = Path(os.environ.get("MLENV_DATA", REPO.parent / "shared" / "data")) / "kuairand"
needs_real_data = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"no KuaiRand files in {REAL}: set MLENV_DATA to the folder that holds kuairand/"
)

# Invented rows under the real headers.
SAMPLE = (
    "time_ms,date,hour,user_id,video_id,author_id,tab,tag,video_type,upload_type,music_type,duration_s,user_active_degree,"
    "is_live_streamer,is_video_author,follow_user_num_range,fans_user_num_range,friend_user_num_range,register_days_range,"
    "onehot_feat1,onehot_feat3,onehot_feat8,hist_long_view,is_click,long_view,is_like,is_follow,is_comment,is_forward,is_hate,"
    "is_profile_enter,play_s"
)
USER = 'full_active,-124,1,"(10,50]","[1,10)",0,730+,1,20,300'
FIRST = f"1650812741436,20220425,9,7,70,700,1,3|12,NORMAL,Web,9,12.5,{USER},41|42,1,0,0,0,0,0,0,1,8.0"
SECOND = f"1650899141436,20220426,9,8,71,701,0,,AD,Kmovie,-1,0.0,{USER},,0,1,1,1,1,1,1,0,0.0"

LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,play_time_ms,"
    "duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
USER_FEATURES = (
    "user_id,user_active_degree,is_live_streamer,is_video_author,follow_user_num_range,fans_user_num_range,friend_user_num_range,"
    "register_days_range,onehot_feat1,onehot_feat3,onehot_feat8"
)
VIDEO_FEATURES = "video_id,author_id,video_type,upload_type,music_type,tag"


def write(path, *lines):
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))


@pytest.fixture
def sample(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write(source / "sample_train.csv.gz", SAMPLE, FIRST, SECOND)
    write(source / "sample_valid.csv.gz", SAMPLE, FIRST.replace("20220425", "20220427"))
    write(source / "sample_test.csv.gz", SAMPLE, FIRST.replace("20220425", "20220428"))
    return source


def read(folder, day):
    return pq.ParquetFile(folder / f"date={day}" / "part-00000.parquet").read()


def logged(user, video, minute, long_view):
    """One row of the log, so many minutes after the first."""
    return f"{user},{video},20220425,{900 + minute},{1650812741436 + 60_000 * minute},1,0,0,0,0,0,{long_view},8000,12500,0,0,0,0,1"


@pytest.fixture
def log(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    rows = [
        logged(7, 70, 3, 1),
        logged(7, 71, 1, 1),
        logged(7, 71, 1, 1),
        logged(7, 70, 2, 0),
        logged(7, 72, 3, 1),
        logged(8, 70, 5, 0),
        logged(7, 70, 4, 0),
    ]
    write(source / "log_standard_0425_0504.csv.gz", LOG, *rows)
    write(source / "user_features_pure.csv.gz", USER_FEATURES, f"8,{USER}", f"7,{USER}")
    write(
        source / "video_features_basic_pure.csv.gz",
        VIDEO_FEATURES,
        "72,702,NORMAL,Web,9.0,",
        '70,700,NORMAL,Web,,"3,12"',
        "71,701,AD,Web,4.0,5",
    )
    sequences = {"user_id": [7, 9], "watch_seq": [[1], [2]], "long_watch_seq": [list(range(40, 50)), [1]]}
    pq.write_table(pa.table(sequences), source / "user_sequences.parquet")
    return source


def test_days_rows_and_types(sample, tmp_path):
    convert_kuairand(sample, tmp_path / "out")

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"date=2022-04-{day}" for day in (25, 26, 27, 28)]
    first, second = read(tmp_path / "out", "2022-04-25"), read(tmp_path / "out", "2022-04-26")
    assert first.schema.field("event_time").type == pa.timestamp("ms", tz="UTC")
    assert first.schema.field("user_id").type == pa.int64()
    assert first.schema.field("follow_user_num_range").type == pa.string()
    assert first.schema.field("tag").type == first.schema.field("hist_long_view").type == pa.list_(pa.int64())
    assert first.schema.field("click").type == pa.int8()
    [row] = first.to_pylist()
    assert row["event_time"] == datetime(2022, 4, 24, 15, 5, 41, 436000, UTC)
    assert row["follow_user_num_range"] == "(10,50]"
    assert (row["tag"], row["hist_long_view"], row["duration_s"], row["play_s"]) == ([3, 12], [41, 42], 12.5, 8.0)
    tasks = ("click", "long_view", "like", "follow", "comment", "forward", "hate", "profile_enter")
    assert [row[task] for task in tasks] == [1, 0, 0, 0, 0, 0, 0, 1]
    [row] = second.to_pylist()
    assert (row["tag"], row["hist_long_view"], row["music_type"]) == (None, [], -1)
    assert [row[task] for task in tasks] == [0, 1, 1, 1, 1, 1, 1, 0]
    keys = [key for day in (25, 26, 27, 28) for key in read(tmp_path / "out", f"2022-04-{day}")["impression_id"].to_pylist()]
    assert keys == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("1650812741436", "yesterday", r"sample_test\.csv\.gz, line 2, column 'time_ms': expected an integer\. Received: 'yesterday'"),
        ("20220428", "20220431", "line 2, column 'date': expected a day as YYYYMMDD. Received: '20220431'"),
        (",9,7,70,", ",9,,70,", "line 2, column 'user_id': expected an integer. Received: ''"),
        ("3|12", "3|x", r"line 2, column 'tag': expected integers separated by '\|' or ','\. Received: '3\|x'"),
        ("41|42,1,", "41|42,2,", "line 2, column 'is_click': expected 0 or 1. Received: '2'"),
        ("12.5", "long", "line 2, column 'duration_s': expected a number or nothing. Received: 'long'"),
        ("is_like", "liked", "column 'is_like': expected a column of this name"),
    ],
)
def test_names_what_cannot_be_converted(sample, tmp_path, before, after, message):
    text = "\n".join([SAMPLE, FIRST.replace("20220425", "20220428")])
    assert before in text
    write(sample / "sample_test.csv.gz", text.replace(before, after))
    with pytest.raises(DataError, match=message):
        convert_kuairand(sample, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_a_missing_file(sample, tmp_path):
    (sample / "sample_valid.csv.gz").unlink()
    with pytest.raises(DataError, match=r"sample_valid\.csv\.gz: expected a CSV file\. Received: 'no such file'"):
        convert_kuairand(sample, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [sample]


def test_refuses_the_output_before_it_reads(tmp_path):
    with pytest.raises(DataError, match="mkdir -p"):
        convert_kuairand(tmp_path / "absent", tmp_path / "missing" / "out")


def test_the_log_has_the_columns_of_the_sample(log, sample_schema, tmp_path):
    convert_kuairand_log(log, tmp_path / "out")
    assert read(tmp_path / "out", "2022-04-25").schema.equals(sample_schema)


@pytest.fixture
def sample_schema(tmp_path):
    (tmp_path / "sample").mkdir()
    write(tmp_path / "sample" / "sample_train.csv.gz", SAMPLE, FIRST)
    for name in ("valid", "test"):
        write(tmp_path / "sample" / f"sample_{name}.csv.gz", SAMPLE, SECOND)
    convert_kuairand(tmp_path / "sample", tmp_path / "converted sample")
    return read(tmp_path / "converted sample", "2022-04-25").schema


def test_the_log_is_joined_and_keeps_its_order(log, tmp_path):
    convert_kuairand_log(log, tmp_path / "out")
    rows = pl.DataFrame(read(tmp_path / "out", "2022-04-25"))
    assert rows["video_id"].to_list() == [70, 71, 71, 70, 72, 70, 70]
    assert rows["author_id"].to_list() == [700, 701, 701, 700, 702, 700, 700]
    assert rows["tag"].to_list()[1:5] == [[5], [5], [3, 12], None]
    assert rows["music_type"].to_list()[1:5] == [4, 4, -1, 9]
    assert rows["hour"].unique().to_list() == [9]
    assert rows["play_s"].unique().to_list() == [8.0]
    assert rows["duration_s"].unique().to_list() == [12.5]


def test_histories_grow_with_the_log(log, tmp_path):
    convert_kuairand_log(log, tmp_path / "out")
    earlier = list(range(40, 50))
    assert (
        read(tmp_path / "out", "2022-04-25")["hist_long_view"].to_pylist()
        == [
            [*earlier[1:], 71],  # video 71 was viewed at minute 1; its repeated row counts once
            earlier,  # a view is not its own history
            earlier,
            [*earlier[1:], 71],
            [*earlier[1:], 71],  # nor is one of the same moment
            [],  # another user, without earlier views
            [*earlier[3:], 71, 70, 72],
        ]
    )


def test_names_missing_sequences(log, tmp_path):
    (log / "user_sequences.parquet").unlink()
    with pytest.raises(DataError, match=r"user_sequences\.parquet: expected a Parquet file"):
        convert_kuairand_log(log, tmp_path / "out")


@needs_real_data
def test_the_real_sample(tmp_path):
    convert_kuairand(REAL, tmp_path / "out")
    counts, clicks = {}, 0
    for path in sorted((tmp_path / "out").rglob("*.parquet")):
        rows = pq.ParquetFile(path).read()
        counts[date.fromisoformat(path.parent.name.removeprefix("date="))] = len(rows)
        clicks += sum(rows["click"].to_pylist())
    assert (min(counts), max(counts)) == (date(2022, 4, 25), date(2022, 5, 8))
    parts = [("2022-04-25", "2022-05-04"), ("2022-05-05", "2022-05-06"), ("2022-05-07", "2022-05-08")]
    sums = [sum(count for day, count in counts.items() if first <= day.isoformat() <= last) for first, last in parts]
    assert sums == [44_219, 7_091, 7_665]
    assert clicks / sum(sums) == pytest.approx(0.445, abs=0.0005)

    schema = from_plain(yaml.safe_load(SCHEMA.read_text())["schema"], Schema, "schema")
    reader = ParquetSource(DataConfig(path=str(tmp_path / "out"), train=WindowConfig()), WindowConfig(), schema)
    assert sum(len(batch) for batch in reader.batches()) == sum(sums)
    outcomes = {"play_s", "click", "long_view", "like", "follow", "comment", "forward", "hate", "profile_enter"}
    assert not outcomes & ({key.column for key in schema.sparse_keys} | {column.column for column in schema.dense_columns})


@needs_real_data
def test_the_real_log_gives_the_histories_of_the_real_sample(tmp_path):
    convert_kuairand(REAL, tmp_path / "sample")
    convert_kuairand_log(REAL, tmp_path / "log")
    key = ["user_id", "video_id", "event_time"]
    sample, log = (
        pl.concat([pl.DataFrame(pq.ParquetFile(path).read()) for path in sorted((tmp_path / name).rglob("*.parquet"))])
        for name in ("sample", "log")
    )
    assert len(log) == 171_671
    training = sample.filter(pl.col("impression_id") < 44_219)  # the log ends where validation begins
    both = training.join(log.unique(key, keep="first"), on=key, suffix="_log")
    assert len(both) == len(training) == 44_219
    assert both["hist_long_view"].to_list() == both["hist_long_view_log"].to_list()
    for name in ("author_id", "tag", "video_type", "music_type", "user_active_degree", "onehot_feat3", "tab", "click"):
        assert both[name].equals(both[f"{name}_log"].alias(name), null_equal=True), name


@needs_real_data
def test_features_joined_at_training_time_are_those_that_the_converter_joins(tmp_path):
    """The log without users and videos, and their files as tables: read through joins, each row is the converter's."""
    convert_kuairand_log(REAL, tmp_path / "joined")
    first = "date=2022-04-25/part-00000.parquet"
    expected = pq.ParquetFile(tmp_path / "joined" / first).read()
    added = [*USER_COLUMNS, *VIDEO_COLUMNS]
    (tmp_path / "log" / first).parent.mkdir(parents=True)
    pq.write_table(expected.drop_columns(added), tmp_path / "log" / first, row_group_size=20_000)
    read_csv(REAL / USERS, {"user_id": ID, **USER_COLUMNS}).write_parquet(tmp_path / "users.parquet")
    read_csv(REAL / VIDEOS, {"video_id": ID, **VIDEO_COLUMNS}).write_parquet(tmp_path / "videos.parquet")
    transforms = (
        JoinConfig(table=str(tmp_path / "users.parquet"), key=("user_id",), columns=tuple(USER_COLUMNS), min_match_rate=0.9),
        JoinConfig(table=str(tmp_path / "videos.parquet"), key=("video_id",), columns=tuple(VIDEO_COLUMNS), min_match_rate=0.9),
        DeriveConfig(column="music_type", sql="COALESCE(music_type, -1)"),
    )
    schema = from_plain(yaml.safe_load(SCHEMA.read_text())["schema"], Schema, "schema")
    reader = ParquetSource(DataConfig(path=str(tmp_path / "log"), train=WindowConfig(), transforms=transforms), WindowConfig(), schema)
    read = pa.Table.from_batches(list(reader.record_batches(tuple(expected.schema.names))))
    for name in expected.schema.names:
        assert read.column(name).to_pylist() == expected.column(name).to_pylist(), name
