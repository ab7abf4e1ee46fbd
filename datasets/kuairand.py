"""KuaiRand-Pure as day partitions: short-video impressions and what the viewers did.

The partitions hold ``impression_id`` (running number), ``event_time``, the context, the user, the video, the user's last
long views (``hist_long_view``, oldest first, strictly before the impression) and outcomes. ``play_s`` and the labels are
outcomes, never features. The day of a partition and ``hour`` are local (UTC+8), as in the source; in about one row of a
hundred they differ from ``event_time``.

Source: Gao et al., "KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed Videos", CIKM 2022.
The data set's licence is CC BY-SA 4.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from mlenv.datasets.csv_table import ID, LABEL, Cells, read_csv
from mlenv.datasets.day_partitions import write_day_partitions
from mlenv.errors import DataError

SAMPLES = ("sample_train.csv.gz", "sample_valid.csv.gz", "sample_test.csv.gz")
LOG = "log_standard_0425_0504.csv.gz"
USERS = "user_features_pure.csv.gz"
VIDEOS = "video_features_basic_pure.csv.gz"
SEQUENCES = "user_sequences.parquet"

HISTORY_LENGTH = 10

INTEGER = Cells("an integer or nothing", lambda text: text.str.strip_suffix(".0").cast(pl.Int64, strict=False))
NUMBER = Cells("a number or nothing", lambda text: text.cast(pl.Float64, strict=False))
TEXT = Cells("text", lambda text: text)
DAY = Cells("a day as YYYYMMDD", lambda text: text.str.to_date("%Y%m%d", strict=False), may_be_empty=False)
IDS = Cells(
    "integers separated by '|' or ','",
    lambda text: pl.when(text.str.contains(r"^\d+([|,]\d+)*$")).then(
        text.str.replace_all(",", "|").str.split("|").cast(pl.List(pl.Int64), strict=False)
    ),
)

LABELS = {
    "is_click": "click",
    "long_view": "long_view",
    "is_like": "like",
    "is_follow": "follow",
    "is_comment": "comment",
    "is_forward": "forward",
    "is_hate": "hate",
    "is_profile_enter": "profile_enter",
}
"""Names in the files, and in the partitions."""

USER_COLUMNS = {
    "user_active_degree": TEXT,
    "is_live_streamer": INTEGER,
    "is_video_author": INTEGER,
    "follow_user_num_range": TEXT,
    "fans_user_num_range": TEXT,
    "friend_user_num_range": TEXT,
    "register_days_range": TEXT,
    "onehot_feat1": INTEGER,
    "onehot_feat3": INTEGER,
    "onehot_feat8": INTEGER,
}
VIDEO_COLUMNS = {"author_id": ID, "tag": IDS, "video_type": TEXT, "upload_type": TEXT, "music_type": INTEGER}
IMPRESSION_COLUMNS = {"time_ms": ID, "date": DAY, "user_id": ID, "video_id": ID, "tab": ID, **dict.fromkeys(LABELS, LABEL)}


def convert_kuairand(source: Path, out: Path) -> None:
    """Writes the sample of KuaiRand-Pure (train, valid and test, which are split by day) to ``out/date=YYYY-MM-DD/``.

    Raises:
        DataError: a file or a column is missing or cannot be read; or ``out`` exists and is not empty, or has no parent folder.
    """

    def read() -> pl.DataFrame:
        columns = {
            **IMPRESSION_COLUMNS,
            "hour": INTEGER,
            **USER_COLUMNS,
            **VIDEO_COLUMNS,
            "duration_s": NUMBER,
            "hist_long_view": IDS,
            "play_s": NUMBER,
        }
        rows = pl.concat([read_csv(source / name, columns) for name in SAMPLES])
        return rows.with_columns(pl.col("hist_long_view").fill_null([]))

    write_day_partitions(_days(read), out)


def convert_kuairand_log(source: Path, out: Path) -> None:
    """Writes the whole standard log (all users, ten days, repeated rows included) with the columns of ``convert_kuairand``.

    Features of users and videos are joined; histories begin with ``user_sequences.parquet`` and grow with the log.

    Raises:
        DataError: a file or a column is missing or cannot be read; or ``out`` exists and is not empty, or has no parent folder.
    """

    def read() -> pl.DataFrame:
        milliseconds = ("play_time_ms", "duration_ms")
        log = read_csv(source / LOG, {**IMPRESSION_COLUMNS, "hourmin": INTEGER, **dict.fromkeys(milliseconds, NUMBER)})
        users = read_csv(source / USERS, {"user_id": ID, **USER_COLUMNS})
        videos = read_csv(source / VIDEOS, {"video_id": ID, **VIDEO_COLUMNS})
        rows = log.with_columns(
            hour=pl.col("hourmin") // 100,
            play_s=pl.col("play_time_ms") / 1000,
            duration_s=pl.col("duration_ms") / 1000,
            hist_long_view=_histories(log, _earlier_long_views(source / SEQUENCES)),
        )
        rows = rows.join(users, on="user_id", how="left", maintain_order="left").join(
            videos, on="video_id", how="left", maintain_order="left"
        )
        return rows.drop("hourmin", *milliseconds).with_columns(pl.col("music_type").fill_null(-1))  # as in the sample

    write_day_partitions(_days(read), out)


def _days(read: Callable[[], pl.DataFrame]) -> Iterator[tuple[date, pa.Table]]:
    """Reads when the first day is asked for, so that an output folder that cannot be used is refused before."""
    rows = read().with_row_index("impression_id")
    event_time = pl.col("time_ms").cast(pl.Datetime("ms", "UTC")).alias("event_time")
    context = ("date", "hour", "user_id", "video_id", "tab")
    outcomes = [pl.col(name).alias(label) for name, label in LABELS.items()]
    rows = rows.select(
        pl.col("impression_id").cast(pl.Int64),
        event_time,
        *context,
        *USER_COLUMNS,
        *VIDEO_COLUMNS,
        "duration_s",
        "hist_long_view",
        *outcomes,
        "play_s",
    )
    for day in rows["date"].unique().sort():
        yield day, _to_arrow(rows.filter(pl.col("date") == day).drop("date"))


def _earlier_long_views(path: Path) -> pl.DataFrame:
    """Long views from before the log: ``user_id``, ``video_id``, oldest first within a user."""
    if not path.is_file():
        raise DataError(
            str(path), expected="a Parquet file", received="no such file", fix="name the folder that holds the downloaded files"
        )
    try:
        sequences = pl.read_parquet(path, columns=["user_id", "long_watch_seq"])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(
            str(path),
            expected="a Parquet file with user_id and long_watch_seq",
            received=str(error).splitlines()[0],
            fix="download it again",
        ) from error
    return sequences.rename({"long_watch_seq": "video_id"}).explode("video_id").drop_nulls()


def _histories(log: pl.DataFrame, earlier: pl.DataFrame) -> pl.Series:
    """The last long views of the row's user strictly before the row, oldest first. A repeated row counts once."""
    columns = ["user_id", "time_ms", "video_id"]
    views = log.unique(maintain_order=True).filter(pl.col("long_view") == 1).select(columns)
    events = pl.concat([earlier.with_columns(time_ms=pl.lit(0, pl.Int64)).select(columns), views])
    events = events.sort("user_id", "time_ms", maintain_order=True)
    moments = _moments(events)
    first = np.searchsorted(moments, _moments(log.with_columns(time_ms=pl.lit(0, pl.Int64))))
    stop = np.searchsorted(moments, _moments(log))
    start = np.maximum(first, stop - HISTORY_LENGTH)
    offsets = np.concatenate([[0], np.cumsum(stop - start)])
    places = np.repeat(start - offsets[:-1], stop - start) + np.arange(offsets[-1])
    videos = events["video_id"].to_numpy()[places]
    return pl.Series(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), videos))


def _moments(rows: pl.DataFrame) -> NDArray[np.int64]:
    """One number that orders rows by user, then by time, whose milliseconds take 42 bits until the year 2109."""
    moments: NDArray[np.int64] = rows.select(pl.col("user_id") * (1 << 42) + pl.col("time_ms")).to_series().to_numpy()
    return moments


def _to_arrow(rows: pl.DataFrame) -> pa.Table:
    """Polars gives large types; a day needs no 64-bit offsets."""
    table = rows.to_arrow()
    plain = {pa.large_string(): pa.string(), pa.large_list(pa.int64()): pa.list_(pa.int64())}
    return table.cast(pa.schema([(field.name, plain.get(field.type, field.type)) for field in table.schema]))
