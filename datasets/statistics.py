"""What a window of data holds, column by column: one pass, mergeable, the same however its rows are cut into batches."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlenv.datasets.counts import ROW_CAPACITY, VALUE_CAPACITY, Counts, Floats, Integers, Keys, Numbers, tally
from mlenv.datasets.hashing import hash_ids, splitmix64
from mlenv.datasets.lists import as_list, list_lengths
from mlenv.errors import DataError
from mlenv.schema import Categorical, Label, Schema
from mlenv.schema import Sequence as EventSequence

STATISTICS_FILE = "statistics.json"
"""Name of the file in the output folder of a training."""
DAY = "date"
"""Folders ``date=...`` that a window is partitioned by act as a column of this name."""

FORMAT = 1
"""Raised when the file changes in a way that an older mlenv would misread."""

PRIOR_ROWS = 10.0
"""Rows of the base rate that every value's label rate starts from, so that a rare value says little."""


@dataclass(frozen=True)
class ColumnStatistics:
    """What one column of a feature holds. Lists count by their elements; parts that a column has not are None."""

    feature: str
    rows: int
    nulls: int
    """Rows that are null."""
    empty: int
    """Rows with an empty list."""
    not_finite: int
    """Numbers that are NaN or infinite; rows, unless the column is a list."""
    absent: Integers
    """``(1 + 2 * tasks,)``: the tally of the rows in which the feature is null, empty or, being one number, not finite."""
    values: Counts | None = None
    """Ids."""
    numbers: Numbers | None = None
    """Numbers: of a feature that is one, of all places of a vector together, the weights of weighted ids."""
    lengths: Numbers | None = None
    """Elements per row that has any, of lists."""

    @property
    def coverage(self) -> float:
        """Share of the rows in which the feature is there."""
        return 1 - float(self.absent[0]) / self.rows if self.rows else 0.0

    def merged(self, other: ColumnStatistics) -> ColumnStatistics:
        """Both parts together."""
        return ColumnStatistics(
            self.feature,
            self.rows + other.rows,
            self.nulls + other.nulls,
            self.empty + other.empty,
            self.not_finite + other.not_finite,
            self.absent + other.absent,
            self.values.merged(other.values) if self.values is not None and other.values is not None else None,
            self.numbers.merged(other.numbers) if self.numbers is not None and other.numbers is not None else None,
            self.lengths.merged(other.lengths) if self.lengths is not None and other.lengths is not None else None,
        )

    def label_aucs(self) -> list[float]:
        """How well the column alone, absent or not, tells positives of each task from negatives; nan without both.

        A row is scored by the label rate of the other rows with its value, so that an id that occurs once tells nothing.
        Of values, numbers and lengths the one that tells most counts.
        """
        spreads = [spread.bins for spread in (self.numbers, self.lengths) if spread is not None]
        parts = spreads if self.values is None else [self.values, *spreads]
        tallies = [np.vstack([part.tallies, self.absent[None] / (1 << part.level)]) for part in parts]
        tasks = (len(self.absent) - 1) // 2
        aucs = ([_leave_one_out_auc(table[:, 1 + 2 * task], table[:, 2 + 2 * task]) for table in tallies] for task in range(tasks))
        return [max((auc for auc in found if not math.isnan(auc)), default=math.nan) for found in aucs]

    def to_plain(self) -> dict[str, Any]:
        """What JSON can hold."""
        counts = {name: getattr(self, name) for name in ("feature", "rows", "nulls", "empty", "not_finite")}
        parts = {name: part.to_plain() for name in ("values", "numbers", "lengths") if (part := getattr(self, name)) is not None}
        return {**counts, "absent": self.absent.tolist(), **parts}

    @classmethod
    def from_plain(cls, plain: dict[str, Any], num_tasks: int) -> ColumnStatistics:
        """The inverse of ``to_plain``."""
        readers = {"values": Counts.from_plain, "numbers": Numbers.from_plain, "lengths": Numbers.from_plain}
        parts: dict[str, Any] = {name: read(plain[name], num_tasks) for name, read in readers.items() if name in plain}
        return cls(**{**plain, "absent": np.array(plain["absent"], np.int64), **parts})


@dataclass(frozen=True)
class Statistics:
    """What a window holds. Counts are the same whatever parts it was read in; means and deviations agree to rounding."""

    tasks: tuple[str, ...]
    rows: int
    columns: dict[str, ColumnStatistics]
    """By feature; by ``feature.field`` for the fields of a sequence."""
    all_rows: Counts
    """By the hash of all that was read of a row but its key: what occurs twice is a repeated row."""
    labels: Integers
    """``(1 + 2 * tasks,)``: the tally of all rows."""
    days: Counts | None = None
    """Rows and labels by day, of the partitions, or else of the event time in UTC."""
    newest: dict[str, int] | None = None
    """Milliseconds since the epoch of the newest event of each day."""
    row_keys: Counts | None = None
    """By the hash of the row key."""
    requests: Counts | None = None
    """By the hash of the request."""
    segments: dict[str, Counts] | None = None
    """Rows and labels by the values of each segment column."""
    data_fingerprint: str = ""
    """Of the source they were taken from; empty once parts are merged."""

    @property
    def coverage(self) -> dict[str, float]:
        """Share of the rows in which each feature is there, by feature; a sequence counts by its first field."""
        return {column.feature: column.coverage for column in reversed(self.columns.values())}

    @property
    def rows_per_request(self) -> float:
        """Rows of a row's own request, on average over the rows: how much less than independent rows so many rows tell; 1 without requests.

        Source: Kish, "Survey Sampling", Wiley 1965 (design effect of a sample of clusters).
        """
        if self.requests is None or not self.requests.num_kept:
            return 1.0
        sizes = self.requests.tallies[:, 0].astype(np.float64)
        return float((sizes**2).sum() / sizes.sum())

    def label_rate(self, task: str, tallied: Integers) -> tuple[int, float]:
        """How many rows of a tally count for a task, and the share of them that is positive."""
        place = self.tasks.index(task)
        counted, positive = int(tallied[1 + 2 * place]), int(tallied[2 + 2 * place])
        return counted, positive / counted if counted else math.nan

    def merged(self, other: Statistics) -> Statistics:
        """Both parts together; they are of one schema."""
        return Statistics(
            tasks=self.tasks,
            rows=self.rows + other.rows,
            columns={name: column.merged(other.columns[name]) for name, column in self.columns.items()},
            all_rows=self.all_rows.merged(other.all_rows),
            labels=self.labels + other.labels,
            days=_merged(self.days, other.days),
            newest=_newest(self.newest, other.newest),
            row_keys=_merged(self.row_keys, other.row_keys),
            requests=_merged(self.requests, other.requests),
            segments=None
            if self.segments is None or other.segments is None
            else {name: counts.merged(other.segments[name]) for name, counts in self.segments.items()},
        )

    def to_json(self) -> str:
        """A document that ``from_json`` reads back to the same statistics."""
        plain = {
            "format": FORMAT,
            "data_fingerprint": self.data_fingerprint,
            "tasks": list(self.tasks),
            "rows": self.rows,
            "labels": self.labels.tolist(),
            "days": self.days and self.days.to_plain(),
            "newest": self.newest,
            "row_keys": self.row_keys and self.row_keys.to_plain(),
            "requests": self.requests and self.requests.to_plain(),
            "all_rows": self.all_rows.to_plain(),
            "segments": None if self.segments is None else {name: entry.to_plain() for name, entry in self.segments.items()},
            "columns": {name: column.to_plain() for name, column in self.columns.items()},
        }
        return json.dumps(plain, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Statistics:
        """The inverse of ``to_json``.

        Raises:
            ValueError, KeyError, TypeError: the text is something else.
        """
        plain = json.loads(text)
        if plain["format"] != FORMAT:
            raise ValueError(f"format {plain['format']}")
        tasks = len(plain["tasks"])

        def counts(name: str, num_tasks: int) -> Counts | None:
            return None if plain[name] is None else Counts.from_plain(plain[name], num_tasks)

        return cls(
            tasks=tuple(plain["tasks"]),
            rows=plain["rows"],
            columns={name: ColumnStatistics.from_plain(column, tasks) for name, column in plain["columns"].items()},
            all_rows=Counts.from_plain(plain["all_rows"], 0),
            labels=np.array(plain["labels"], np.int64),
            days=counts("days", tasks),
            newest=plain["newest"],
            row_keys=counts("row_keys", 0),
            requests=counts("requests", 0),
            segments=None
            if plain["segments"] is None
            else {name: Counts.from_plain(entry, tasks) for name, entry in plain["segments"].items()},
            data_fingerprint=plain["data_fingerprint"],
        )


def read_statistics(path: Path) -> Statistics:
    """Statistics that were stored in a file, or in the output folder of a training.

    Raises:
        DataError: there are none.
    """
    file = path / STATISTICS_FILE if path.is_dir() else path
    fix = "train first, or write them with mlenv validate CONFIG --out DIR"
    try:
        return Statistics.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(str(file), expected="statistics of a window", received=error.strerror or str(error), fix=fix) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(str(file), expected="statistics of a window", received=f"{type(error).__name__}: {error}", fix=fix) from error


def statistics_columns(schema: Schema, available: Collection[str]) -> tuple[str, ...]:
    """Columns that statistics are taken of: features and labels, and of the day and the metadata those that there are."""
    wanted = (*schema.row_key, schema.request, schema.event_time, *schema.segments, DAY)
    return tuple(dict.fromkeys([*schema.columns, *(name for name in wanted if name in available)]))


def collect(batches: Iterable[pa.RecordBatch], schema: Schema) -> Statistics:
    """Reads the batches once. At least one is needed; columns other than features and labels may be missing from all of them."""
    return functools.reduce(Statistics.merged, (_of_batch(batch, schema) for batch in batches))


def collect_days(batches: Iterable[pa.RecordBatch], schema: Schema) -> dict[str, Statistics]:
    """The same by day, in the order of the days: merged they are what ``collect`` gives. Rows without a day are under an empty name."""
    found: dict[str, Statistics] = {}
    for batch in batches:
        for day, rows in [*by_day(batch, schema)] or [("", batch)]:
            part = _of_batch(rows, schema)
            found[day] = found[day].merged(part) if day in found else part
    return dict(sorted(found.items()))


def days_of(batch: pa.RecordBatch, schema: Schema) -> pa.Array | None:
    """The day of each row as text, of the partition, or else of the event time."""
    if DAY in batch.schema.names:
        return batch.column(DAY).cast(pa.string())
    if schema.event_time in batch.schema.names and pa.types.is_timestamp(batch.schema.field(schema.event_time).type):
        return pc.strftime(batch.column(schema.event_time), "%Y-%m-%d")
    return None


def by_day(batch: pa.RecordBatch, schema: Schema) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The rows of each day, in the order of the days; those without one come first, under an empty name."""
    days = days_of(batch, schema)
    texts = pa.repeat("", batch.num_rows) if days is None else days.fill_null("")
    names = sorted(texts.unique().to_pylist())
    for day in names:
        yield day, batch if len(names) == 1 else batch.filter(pc.equal(texts, day))


def _of_batch(batch: pa.RecordBatch, schema: Schema) -> Statistics:
    outcomes = [_outcomes(batch, task, label) for task, label in schema.labels.items()]
    rows, names = batch.num_rows, set(batch.schema.names)
    columns: dict[str, ColumnStatistics] = {}
    identity: Keys = np.zeros(rows, np.uint64)
    for name, feature in schema.features.items():
        fields = feature.fields if isinstance(feature, EventSequence) else None
        for part, column in _columns_of(schema, name, fields):
            columns[part], hashes = _of_column(batch.column(column), name, isinstance(feature, Categorical), outcomes)
            identity = splitmix64(identity ^ hashes)
    for outcome in outcomes:
        identity = splitmix64(identity ^ outcome.view(np.uint64))
    for column in (schema.request, schema.event_time, *schema.segments):
        if column in names:
            identity = splitmix64(identity ^ _plain_hashes(batch.column(column)))
    day = days_of(batch, schema)
    keys = [_plain_hashes(batch.column(column)) for column in schema.row_key if column in names]
    whole = tally(np.zeros(rows, np.int64), 1, outcomes)
    return Statistics(
        tasks=schema.tasks,
        rows=rows,
        columns=columns,
        all_rows=_of_rows(identity),
        labels=whole[0],
        days=None if day is None else _of_values(day.drop_null(), _valid(day, outcomes)),
        newest=_newest_events(batch, schema, day),
        row_keys=_of_rows(functools.reduce(lambda left, right: splitmix64(left ^ right), keys)) if keys else None,
        requests=_of_rows(_plain_hashes(batch.column(schema.request).drop_null())) if schema.request in names else None,
        segments={column: _of_texts(batch.column(column), outcomes) for column in schema.segments if column in names},
    )


def _columns_of(schema: Schema, name: str, fields: Any) -> list[tuple[str, str]]:
    """Name of the statistics and column, for each column of a feature."""
    if fields is not None:
        return [(f"{name}.{part}", field.column or f"{name}_{part}") for part, field in fields.items()]
    return [(name, schema.features[name].column or name)]


def _of_column(column: pa.Array, feature: str, is_id: bool, outcomes: Sequence[Integers]) -> tuple[ColumnStatistics, Keys]:
    """Statistics of one column, and a hash of what each row of it holds."""
    rows = len(column)
    if pa.types.is_nested(column.type):
        return _of_lists(as_list(column), feature, outcomes)
    if is_id:
        present = _present(column)
        plain = column.drop_null()
        hashes = np.zeros(rows, np.uint64)
        values, hashes[present] = _counted(plain, _valid(column, outcomes))
        nulls = rows - int(present.sum())
        return ColumnStatistics(feature, rows, nulls, 0, 0, _absent(~present, outcomes), values=values), hashes
    numbers, nulls = _floats(column), int(column.null_count)
    finite = np.isfinite(numbers)
    spread = Numbers.of(numbers[finite], [outcome[finite] for outcome in outcomes])
    absent = _absent(~finite, outcomes)
    hashes = splitmix64(numbers.view(np.uint64))
    return ColumnStatistics(feature, rows, nulls, 0, int(absent[0]) - nulls, absent, numbers=spread), hashes


def _of_lists(column: pa.Array, feature: str, outcomes: Sequence[Integers]) -> tuple[ColumnStatistics, Keys]:
    """Ids, pairs of an id and a weight, or numbers."""
    rows, lengths, elements = len(column), list_lengths(column), column.flatten()
    values = numbers = None
    not_finite = 0
    row_of = np.repeat(np.arange(rows), lengths)
    hashes = np.zeros(len(elements), np.uint64)
    if pa.types.is_struct(elements.type):
        ids, weights = elements.flatten()
    elif pa.types.is_floating(elements.type) or pa.types.is_decimal(elements.type):
        ids, weights = None, elements
    else:
        ids, weights = elements, None
    if ids is not None:
        present = _present(ids)
        values, hashes[present] = _counted(ids.drop_null(), [outcome[row_of[present]] for outcome in outcomes])
    if weights is not None:
        floats = _floats(weights)
        finite = np.isfinite(floats)
        not_finite = len(floats) - int(finite.sum()) - int(weights.null_count)
        numbers = Numbers.of(floats[finite], [outcome[row_of[finite]] for outcome in outcomes])
        hashes = splitmix64(hashes ^ splitmix64(floats.view(np.uint64)))
    is_absent = lengths == 0
    filled = Numbers.of(lengths[~is_absent].astype(np.float64), [outcome[~is_absent] for outcome in outcomes])
    nulls = int(column.null_count)
    absent = _absent(is_absent, outcomes)
    found = ColumnStatistics(feature, rows, nulls, int(absent[0]) - nulls, not_finite, absent, values, numbers, filled)
    starts = np.cumsum(lengths) - lengths
    placed = splitmix64(hashes + (np.arange(len(hashes)) - starts[row_of]).astype(np.uint64))
    row_hashes = np.zeros(rows, np.uint64)
    np.add.at(row_hashes, row_of, placed)
    return found, row_hashes


def _counted(values: pa.Array, outcomes: Sequence[Integers]) -> tuple[Counts, Keys]:
    """Counts of values without nulls, and the hash of each."""
    encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    distinct, codes = encoded.dictionary, encoded.indices.cast(pa.int64()).to_numpy()
    plain = distinct.cast(pa.int64() if pa.types.is_integer(distinct.type) else pa.string())
    hashes = hash_ids(plain)
    tallies = tally(codes, len(plain), outcomes)
    used = np.flatnonzero(tallies[:, 0])  # a dictionary may hold values that no row of the batch has
    counts = Counts.of(hashes[used], tallies[used], plain.take(pa.array(used)), VALUE_CAPACITY)
    return counts, hashes[codes]


def _of_values(values: pa.Array, outcomes: Sequence[Integers]) -> Counts:
    return _counted(values, outcomes)[0]


def _of_texts(column: pa.Array, outcomes: Sequence[Integers]) -> Counts:
    """Counts of any plain column by the texts of its values, nulls left out."""
    return _of_values(column.cast(pa.string()).drop_null(), _valid(column, outcomes))


def _of_rows(hashes: Keys) -> Counts:
    ones = np.ones((len(hashes), 1), np.int64)
    return Counts.of(hashes, ones, None, ROW_CAPACITY)


def _plain_hashes(column: pa.Array) -> Keys:
    """A hash per row of any plain column; null has its own."""
    if not pa.types.is_integer(column.type):
        column = column.cast(pa.int64() if pa.types.is_timestamp(column.type) else pa.string())
    hashes = np.zeros(len(column), np.uint64)
    hashes[_present(column)] = hash_ids(column.drop_null())
    return hashes


def _outcomes(batch: pa.RecordBatch, task: str, label: Label) -> Integers:
    """As ``tally`` takes them: an example counts as it does in training."""
    positive = _floats(batch.column(label.column or task))
    counts = np.isfinite(positive)
    if label.mask:
        counts &= np.nan_to_num(_floats(batch.column(label.mask))) > 0
    if label.weight:
        counts &= np.nan_to_num(_floats(batch.column(label.weight))) > 0
    return np.where(counts, 1 + (np.nan_to_num(positive) > 0), 0).astype(np.int64)


def _newest_events(batch: pa.RecordBatch, schema: Schema, day: pa.Array | None) -> dict[str, int] | None:
    if day is None or schema.event_time not in batch.schema.names:
        return None
    column = batch.column(schema.event_time)
    if not pa.types.is_timestamp(column.type):
        return None
    moments = column.cast(pa.timestamp("ms", column.type.tz), safe=False).cast(pa.int64())
    table = pa.table({"day": day, "moment": moments}).group_by("day").aggregate([("moment", "max")])
    found = zip(table["day"].to_pylist(), table["moment_max"].to_pylist(), strict=True)
    return {name: moment for name, moment in found if name is not None and moment is not None}


def _floats(column: pa.Array) -> Floats:
    """Nulls become NaN."""
    floats: Floats = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return floats


def _present(column: pa.Array) -> NDArray[np.bool_]:
    present: NDArray[np.bool_] = column.is_valid().to_numpy(zero_copy_only=False)
    return present


def _valid(column: pa.Array, outcomes: Sequence[Integers]) -> list[Integers]:
    """Outcomes of the rows that are not null."""
    present = _present(column)
    return [outcome[present] for outcome in outcomes]


def _absent(is_absent: NDArray[np.bool_], outcomes: Sequence[Integers]) -> Integers:
    chosen = [outcome[is_absent] for outcome in outcomes]
    counted: Integers = tally(np.zeros(int(is_absent.sum()), np.int64), 1, chosen)[0]
    return counted


def _merged(first: Counts | None, second: Counts | None) -> Counts | None:
    return None if first is None or second is None else first.merged(second)


def _newest(first: dict[str, int] | None, second: dict[str, int] | None) -> dict[str, int] | None:
    if first is None or second is None:
        return None
    days = sorted(first.keys() | second.keys())
    return {day: max(part[day] for part in (first, second) if day in part) for day in days}


def _leave_one_out_auc(counted: Floats, positive: Floats) -> float:
    """AUC of scoring each row by the label rate of the other rows with its value, over a few rows of the base rate.

    Two rows of one value are a tie: that each is scored without itself must not tell them apart.
    """
    total, hits = counted.sum(), positive.sum()
    if not 0 < hits < total:
        return math.nan
    prior, others = PRIOR_ROWS * hits / total, np.maximum(counted - 1, 0) + PRIOR_ROWS
    scores = np.concatenate([(np.maximum(positive - 1, 0) + prior) / others, (positive + prior) / others])
    of_positive = np.concatenate([positive, np.zeros_like(positive)])
    of_negative = np.concatenate([np.zeros_like(positive), counted - positive])
    order = np.argsort(scores, kind="stable")
    scores, of_positive, of_negative = scores[order], of_positive[order], of_negative[order]
    starts = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]]))
    of_positive, of_negative = np.add.reduceat(of_positive, starts), np.add.reduceat(of_negative, starts)
    below = np.cumsum(of_negative) - of_negative
    ties = (positive * (counted - positive)).sum() / 2
    return float(((of_positive * (below + of_negative / 2)).sum() + ties) / (hits * (total - hits)))
