"""Times of rows as microseconds since 1970 in UTC, and lengths of time as a config writes them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlenv.datasets.side_table import key_kind
from mlenv.datasets.transforms.expressions import as_array
from mlenv.errors import ConfigError, DataError

if TYPE_CHECKING:
    import polars as pl

Integers = NDArray[np.int64]

_MICROSECONDS = {"ms": 1_000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
_DURATION = re.compile(r"(\d+(ms|[smhd]))+")


def duration(text: str) -> int:
    """Microseconds of a length of time such as 1d12h; 0 for nothing."""
    return sum(int(number) * _MICROSECONDS[unit] for number, unit in re.findall(r"(\d+)(ms|[smhd])", text))


def check_duration(key: str, text: str) -> None:
    """
    Raises:
        ConfigError: it is neither empty nor a length of time.
    """
    if text and not _DURATION.fullmatch(text):
        raise ConfigError(key, expected="a length of time such as 90m, 3h or 1d12h", received=text)


def check_time(key: str, name: str, kind: pa.DataType, *, days: bool = True, text_days: bool = False) -> None:
    """
    Raises:
        ConfigError: a column holds neither timestamps nor, where they may stand for times, days.
    """
    is_day = (days and pa.types.is_date(kind)) or (text_days and key_kind(kind) == "text")
    if not (pa.types.is_timestamp(kind) or is_day):
        fix = f"write it as a timestamp; milliseconds become one by CAST({name} * 1000 AS TIMESTAMP)"
        expected = f"a column of timestamps{' or days' if days else ''}"
        raise ConfigError(key, expected=expected, received=f"{name}, which is {kind}", fix=fix)


def check_time_zone(name: str) -> None:
    """
    Raises:
        ConfigError: nobody knows it.
    """
    import polars as pl

    try:
        pl.select(pl.lit(0).cast(pl.Datetime("us", "UTC")).dt.convert_time_zone(name))
    except pl.exceptions.PolarsError as error:
        raise ConfigError("time_zone", expected="a time zone such as Europe/Oslo", received=name) from error


def microseconds(times: pa.Array, place: str, time_zone: str = "UTC", *, round_up: bool = False) -> tuple[Integers, NDArray[np.bool_]]:
    """Times since 1970 in UTC, anything where there is none, and where there is one.

    Args:
        time_zone: whose days are meant where the column holds days.

    Raises:
        DataError: a text is no day, or a time lies beyond what 64 bits can say.
    """
    import polars as pl

    known = times.is_valid().to_numpy(zero_copy_only=False)
    try:
        if not pa.types.is_timestamp(times.type):
            days = pl.from_arrow(times.cast(pa.date32()))
            assert isinstance(days, pl.Series)
            return to_utc(days.cast(pl.Datetime("us")), time_zone), known
        fine = times.cast(pa.timestamp("ns" if times.type.unit == "ns" else "us", times.type.tz)).cast(pa.int64())
    except (pa.ArrowException, pl.exceptions.PolarsError) as error:
        expected = "timestamps, or days as YYYY-MM-DD"
        raise DataError(place, expected=expected, received=" ".join(str(error).split()), fix="write the column anew") from error
    numbers: Integers = pc.fill_null(fine, 0).to_numpy()
    if times.type.unit == "ns":
        numbers = -(-numbers // 1000) if round_up else numbers // 1000
    return numbers, known


def to_utc(local: pl.Series, time_zone: str) -> Integers:
    """Microseconds of local times: of two instants the later, and past the gap where the clock skips them."""
    import polars as pl

    frame = local.to_frame("local").select(
        pl.coalesce(
            (pl.col("local") + pl.duration(hours=hours)).dt.replace_time_zone(time_zone, ambiguous="latest", non_existent="null")
            for hours in (0, 1)
        ).dt.epoch("us")
    )
    numbers: Integers = as_array(frame.to_series().fill_null(0)).to_numpy()
    return numbers
