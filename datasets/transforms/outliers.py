"""Drops the days of a segment that break its own history, such as an advertiser whose conversions are suddenly counted twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlenv.config import Findings
from mlenv.datasets.transforms.expressions import require_columns
from mlenv.errors import ConfigError, check_above, check_at_least

NAMED = 20
"""Segment-days that are named; the others are counted."""


@dataclass(frozen=True)
class Counts:
    """Rows of a row group by segment and day."""

    keys: tuple[tuple[str, str], ...]
    """Segment and day."""
    rows: NDArray[np.int64]
    """``(keys,)``."""
    positives: NDArray[np.int64]
    """``(keys,)``."""
    key_of_row: NDArray[np.int32]
    """``(rows,)``; -1 for a row whose segment or day is null."""


@dataclass(frozen=True, kw_only=True)
class ExcludeOutliersConfig:
    """Excludes each segment-day whose positives lie above ``m + deviations * s``, where m is the median of the earlier days of that
    segment in the window and s the larger of 1.4826 times their median absolute deviation and of what chance alone gives.

    The columns of the whole window are read once before the training; 4 bytes a row of the window are held meanwhile. What is
    excluded is in the log and in the facts of the run. Days that are excluded do not count as history.
    """

    column: str
    """Column of the segment, such as the advertiser."""
    label: str
    """Column of 0 and 1 or of booleans that counts as positive."""
    measure: Literal["rate", "volume"] = "rate"
    """rate compares the share of positives, volume their number."""
    deviations: float = 6.0
    """How far above the median a day may lie."""
    min_rows: int = 100
    """Rows that a segment must have on a day to be judged by it, and for the day to count as history."""
    min_days: int = 3
    """Earlier days of a segment that it takes to judge a day."""
    day_column: str = "date"
    """Column of the day, by whose text days are ordered; that of the folders ``date=YYYY-MM-DD``."""
    when: Literal["always", "train"] = "train"
    """train leaves held-out rows alone."""

    drops_rows: ClassVar[bool] = True
    sampling_seed: ClassVar[int | None] = None
    writes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_above("deviations", self.deviations, 0)
        check_at_least("min_rows", self.min_rows, 1)
        check_at_least("min_days", self.min_days, 1)

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.column, self.label, self.day_column)))

    def held_out(self) -> ExcludeOutliersConfig | None:
        return self if self.when == "always" else None

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        for key in ("column", "label", "day_column"):
            require_columns((getattr(self, key),), columns, key)
        kind = columns.field(self.label).type
        if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)):
            raise ConfigError("label", expected="a column of 0 and 1", received=f"{self.label}, which is {kind}")
        for key in ("column", "day_column"):
            if pa.types.is_nested(kind := columns.field(getattr(self, key)).type):
                raise ConfigError(key, expected="a column of plain values", received=f"{getattr(self, key)}, which is {kind}")
        return columns

    def survey(self, rows: pa.RecordBatch) -> Counts:
        """Counts the rows of a row group by segment and day."""
        (segments, segment_of_row), (days, day_of_row) = (_coded(rows.column(name)) for name in (self.column, self.day_column))
        known = (segment_of_row >= 0) & (day_of_row >= 0)
        codes, key_of_known = np.unique(segment_of_row[known] * max(len(days), 1) + day_of_row[known], return_inverse=True)
        key_of_row = np.full(rows.num_rows, -1, np.int32)
        key_of_row[known] = key_of_known
        labels = pc.fill_null(pc.equal(rows.column(self.label).cast(pa.float64()), 1.0), False).to_numpy(zero_copy_only=False)
        return Counts(
            keys=tuple((segments[code // len(days)], days[code % len(days)]) for code in codes.tolist()),
            rows=np.bincount(key_of_known, minlength=len(codes)),
            positives=np.bincount(key_of_known, labels[known], len(codes)).astype(np.int64),
            key_of_row=key_of_row,
        )

    def conclude(self, surveys: Sequence[Counts]) -> Findings:
        counts: dict[str, dict[str, tuple[int, int]]] = {}
        for survey in surveys:
            for (segment, day), rows, positives in zip(survey.keys, survey.rows.tolist(), survey.positives.tolist(), strict=True):
                by_day = counts.setdefault(segment, {})
                before = by_day.get(day, (0, 0))
                by_day[day] = (before[0] + rows, before[1] + positives)
        excluded = {(segment, day): note for segment, days in sorted(counts.items()) for day, note in self._outliers(days)}
        dropped = []
        for survey in surveys:
            wrong = np.array([key in excluded for key in survey.keys] + [False])  # the last is that of rows without a key
            dropped.append(np.flatnonzero(wrong[survey.key_of_row]))
        notes = [f"{self.column}={segment} on {day}: {note}" for (segment, day), note in excluded.items()]
        more = [f"and {len(notes) - NAMED} more"] if len(notes) > NAMED else []
        return Findings(dropped, (*notes[:NAMED], *more))

    def _outliers(self, days: dict[str, tuple[int, int]]) -> Iterator[tuple[str, str]]:
        """Days of one segment that break its history, each with the reason."""
        history: list[float] = []
        for day, (rows, positives) in sorted(days.items()):
            if rows < self.min_rows:
                continue
            value = positives / rows if self.measure == "rate" else float(positives)
            if len(history) >= self.min_days:
                median = float(np.median(history))
                spread = max(1.4826 * float(np.median(np.abs(np.array(history) - median))), self._chance(median, rows))
                if value > median + self.deviations * spread:
                    yield day, f"{self.measure} {value:.6g} after a median of {median:.6g}, {rows} rows"
                    continue
            history.append(value)

    def _chance(self, median: float, rows: int) -> float:
        """Standard deviation of the measure on a day of so many rows; at least that of one positive."""
        if self.measure == "volume":
            return math.sqrt(max(median, 1.0))
        return max(math.sqrt(median * (1 - median) / rows), 1 / rows)


def _coded(column: pa.Array) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct values as texts, and for each row which one it has; -1 for null."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    codes: NDArray[np.int64] = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy()
    return encoded.dictionary.cast(pa.string()).to_pylist(), codes
