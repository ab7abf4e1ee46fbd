"""Scores that were served against those that a stored model gives now: by row, segment and hour, and the features behind a difference."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from mlenv.datasets.times import check_time, microseconds
from mlenv.errors import ConfigError, DataError, check_above, check_at_least, nearest
from mlenv.inference.batch_rows import join_batches, take_rows
from mlenv.inference.stored_scorer import HeldOut, StoredScorer
from mlenv.pages.page import write_whole
from mlenv.robustness.feature_blame import Blame, blame_features
from mlenv.robustness.logged_features import columns_of_features, encode_logged, logged_features
from mlenv.robustness.parquet_log import KeyColumn, KeyTable, ParquetLog, common_rows, read_keys
from mlenv.robustness.score_parity import PairedScores, Parity
from mlenv.schema import Schema

REPLAY_FILE, PAGE_FILE, ROWS_FILE = "replay.json", "replay.html", "rows.parquet"

SERVED_KEY: Final = ("served_request_id", "served_row")
"""What tells rows apart in the log of ``mlenv serve``."""
SERVED_TIME: Final = "served_at"

_CHUNK: Final = 8192
"""Rows that are scored at once."""
_HOUR: Final = 3_600_000_000
_WORST: Final = 10

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    key: tuple[KeyColumn, ...] = ()
    """What tells rows apart: columns of the log and of the rows. By default the model's ``schema.row_key``; without rows, request and row
    of the log of ``mlenv serve``."""
    scores: Mapping[str, str] = field(default_factory=dict)
    """Column of the log with the score of a task; ``prediction_TASK`` for one that is not named."""
    time: str = ""
    """Column of the log with the time; by default ``served_at``, or the schema's ``event_time``."""
    tolerance: float = 1e-4
    """Difference of two predictions that does not count."""
    limit: float = 0.01
    """Share of the rows that may differ."""
    num_blamed: int = 20_000
    """Rows that differ in which the features behind it are looked for, at most; drawn at random from more."""
    seed: int = 0
    """Of that draw."""

    def __post_init__(self) -> None:
        check_above("--tolerance", self.tolerance, 0)
        check_at_least("--limit", self.limit, 0)
        check_at_least("--blame-rows", self.num_blamed, 1)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """All that was found."""

    model: str
    log: str
    rows: str
    """Where the features of the replay come from."""
    num_logged: int
    num_replayed: int
    num_common: int
    num_without_score: int
    overall: Sequence[Parity]
    segments: Sequence[Parity]
    hours: Sequence[Parity]
    blames: Sequence[Blame]
    """Largest share first; all features together before them."""
    num_blamed: int
    worst: Sequence[Mapping[str, Any]]
    """The rows that are furthest apart: row key, task, logged and replayed prediction."""
    notes: Sequence[str]
    by_row: pa.Table
    """Row key, and ``logged_TASK`` and ``replayed_TASK`` of every row that was compared, in the order of the log."""
    options: ReplayOptions

    def to_plain(self) -> dict[str, Any]:
        """Everything but the rows."""
        plain = asdict(replace(self, by_row=self.by_row.slice(0, 0)))
        del plain["by_row"]
        return plain

    @property
    def is_above(self) -> bool:
        """Whether more rows differ than may."""
        return any(one.differs > self.options.limit for one in self.overall)


@dataclass(frozen=True)
class _Side:
    """What the model says of rows now."""

    keys: KeyTable
    predictions: Floats
    """``(rows, tasks)``."""
    columns: Mapping[str, pa.ChunkedArray]
    """Segments and the time of the event, those that there are."""


def replay_scores(scorer: StoredScorer, model: str, logged: str, rows: HeldOut | None, options: ReplayOptions) -> Replay:
    """
    Args:
        model: name, for people.
        logged: path of the log.
        rows: rows whose features are replayed, joined with the log by row key; the features of the log itself if None.

    Raises:
        ConfigError: the log is not there, or a task is unknown to the model.
        DataError: the log lacks the row key, the scores, or features that it is to be replayed on; no row is on both sides.
    """
    log, schema = ParquetLog(logged, "--logged"), scorer.schema
    columns = _score_columns(log, schema, options)
    if options.time:
        log.check_columns([options.time], "the time of a row")
    key = _key(log, schema, rows, options)
    keys = read_keys(log, [pair.first for pair in key])
    available, said = logged_features(log, schema), _logged_scores(log, columns)
    side = _replay_log(scorer, log, keys, available) if rows is None else _replay_rows(scorer, rows, key)
    everything = np.arange(log.num_rows)
    places = (everything, everything) if rows is None else common_rows(keys, side.keys)
    replayed = side.predictions[places[1]][:, [schema.tasks.index(task) for task in columns]]
    scores = PairedScores(tasks=list(columns), logged=said[places[0]], replayed=replayed, tolerance=options.tolerance)
    times, notes = _times(log, schema, side, places, options)
    segments = {name: side.columns[name].take(pa.array(places[1])) for name in schema.segments if name in side.columns}
    blames: list[Blame] = []
    differing = scores.differing
    if len(differing) > options.num_blamed:
        differing = np.sort(np.random.default_rng(options.seed).choice(differing, options.num_blamed, replace=False))
    if rows is None and len(differing):
        notes.append("the features are those of the log: what differs is the model, its version, or how the server reads values")
    elif rows is not None and len(differing) and available:
        blames = _blames(scorer, log, rows, key, (places[0][differing], places[1][differing]), scores.rows(differing))
    elif len(differing):
        notes.append("the log has no features of the model, so that no feature can be found behind the difference")
    return Replay(
        model=model,
        log=logged,
        rows="the features of the log" if rows is None else f"{rows.path}, {rows.window}",
        num_logged=log.num_rows,
        num_replayed=len(side.predictions),
        num_common=len(places[0]),
        num_without_score=int(np.isnan(scores.logged).all(axis=1).sum()),
        overall=scores.parity(),
        segments=[one for name, values in segments.items() for one in scores.parity(_texts(name, values))],
        hours=[] if times is None else scores.parity(_hours(times)),
        blames=blames,
        num_blamed=len(differing) if blames else 0,
        worst=_worst(keys, places[0], scores),
        notes=notes,
        by_row=_by_row(keys, places[0], scores),
        options=options,
    )


def write_replay(found: Replay, folder: Path) -> Path:
    """Writes ``replay.json``, ``rows.parquet`` and the page; gives back the page's path."""
    from mlenv.robustness.score_replay_page import render_replay

    folder.mkdir(exist_ok=True)
    write_whole(json.dumps(found.to_plain(), indent=1, default=str), folder / REPLAY_FILE)
    temporary = folder / f".{ROWS_FILE}.{os.getpid()}.part"
    try:
        pq.write_table(found.by_row, temporary, compression="zstd")
        temporary.replace(folder / ROWS_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    write_whole(render_replay(found), folder / PAGE_FILE)
    return folder / PAGE_FILE


def _score_columns(log: ParquetLog, schema: Schema, options: ReplayOptions) -> dict[str, str]:
    """Column of the log by task, in the order of the tasks."""
    for task, column in options.scores.items():
        if task not in schema.tasks:
            raise ConfigError("--score", expected="a task of the model", received=task, fix=nearest(task, schema.tasks))
        log.check_columns([column], f"the logged score of task {task!r}")
    named = {task: options.scores.get(task, f"prediction_{task}") for task in schema.tasks}
    found = {task: column for task, column in named.items() if column in log.columns}
    if not found:
        fix = "name the column of the score: --score TASK=COLUMN"
        received = f"columns {sorted(log.columns)}"
        raise DataError(f"--logged {log.path}", expected=f"one of the columns {list(named.values())}", received=received, fix=fix)
    for column in found.values():
        kind = log.columns[column]
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)):
            raise DataError(f"--logged {log.path}, column {column!r}", expected="predictions in [0, 1]", received=str(kind))
    return found


def _key(log: ParquetLog, schema: Schema, rows: HeldOut | None, options: ReplayOptions) -> tuple[KeyColumn, ...]:
    is_served = rows is None and all(name in log.columns for name in SERVED_KEY)
    key = options.key or tuple(KeyColumn(name, name) for name in (SERVED_KEY if is_served else schema.row_key))
    if not key:
        fix = "name them with --key, or in schema.row_key of the model's config"
        raise DataError(f"--logged {log.path}", expected="columns that identify a row", received=sorted(log.columns), fix=fix)
    return key


def _replay_log(scorer: StoredScorer, log: ParquetLog, keys: KeyTable, available: Sequence[str]) -> _Side:
    schema = scorer.schema
    lacking = [name for name in schema.features if name not in available]
    if lacking:
        fix = "name rows that have them: --path, or --start and --end"
        raise DataError(f"--logged {log.path}", expected="all features of the model", received=f"no columns of {lacking}", fix=fix)
    read_by_calibrators = {name for one in scorer.calibrators.values() for name in one.segments}
    segments = [name for name in schema.segments if name in log.columns or name in read_by_calibrators]
    log.check_columns(segments, "a segment that a calibrator of the model reads")
    others = [name for name in (schema.event_time,) if name and name in log.columns]
    parts, first = [], 0
    for table in log.tables(list(dict.fromkeys([*schema.feature_columns, *segments]))):
        for start in range(0, table.num_rows, _CHUNK):
            batch = encode_logged(table.slice(start, _CHUNK), schema, segments, f"--logged {log.path}", first + start)
            parts.append(scorer(batch))
        first += table.num_rows
    columns = log.read([*segments, *others])
    predictions = torch.cat(parts).double().numpy() if parts else np.zeros((0, len(schema.tasks)))
    return _Side(keys, predictions, dict(zip(columns.column_names, columns.columns, strict=True)))


def _replay_rows(scorer: StoredScorer, rows: HeldOut, key: Sequence[KeyColumn]) -> _Side:
    source = scorer.source(rows, _carrying(scorer.schema, key), has_labels=False)
    metadata, parts = [], []
    for batch in source.batches():
        metadata.append(batch.metadata)
        parts.append(scorer(batch))
    if not parts:
        raise source.nothing_left()
    table = pa.Table.from_batches(metadata)
    names = [pair.second for pair in key]
    keys = KeyTable(rows.path, names, [table.column(name) for name in names])
    return _Side(keys, torch.cat(parts).double().numpy(), dict(zip(table.column_names, table.columns, strict=True)))


def _carrying(schema: Schema, key: Sequence[KeyColumn]) -> Schema:
    return replace(schema, row_key=tuple(pair.second for pair in key))


def _logged_scores(log: ParquetLog, scores: Mapping[str, str]) -> Floats:
    """``(rows, tasks)``; NaN where there is none."""
    columns = [pl.Series(pl.from_arrow(log.read([column]).column(0))).cast(pl.Float64).to_numpy() for column in scores.values()]
    for name, values in zip(scores.values(), columns, strict=True):
        wrong = (values < 0) | (values > 1)
        if wrong.any():
            row = int(np.argmax(wrong))
            fix = "name the column of predictions, not of logits: --score TASK=COLUMN"
            raise DataError(
                f"--logged {log.path}, row {row}, column {name!r}", expected="a prediction in [0, 1]", received=float(values[row]), fix=fix
            )
    scores_of_log: Floats = np.stack(columns, axis=1).astype(np.float64)
    if not np.isfinite(scores_of_log).any():
        raise DataError(f"--logged {log.path}", expected=f"predictions in {list(scores.values())}", received="none in any row")
    return scores_of_log


def _columns(schema: Schema, features: Sequence[str]) -> list[str]:
    columns = columns_of_features(schema)
    return list(dict.fromkeys(column for name in features for column in columns[name]))


def _times(
    log: ParquetLog, schema: Schema, side: _Side, places: tuple[Ints, Ints], options: ReplayOptions
) -> tuple[Ints | None, list[str]]:
    """Of the common rows."""
    name = options.time or (SERVED_TIME if SERVED_TIME in log.columns else schema.event_time)
    if name in log.columns:
        values, place = log.read([name]).column(0).take(pa.array(places[0])), f"--logged {log.path}, column {name!r}"
    elif name in side.columns:
        values, place = side.columns[name].take(pa.array(places[1])), f"column {name!r} of the rows"
    else:
        return None, ["nothing by hour: no column of the time is known; name one with --time"]
    check_time(place, name, values.type)
    numbers, known = microseconds(values.combine_chunks(), place)
    return np.where(known, numbers, -1), []


def _hours(times: Ints) -> pl.Series:
    """Such as 2026-01-03 07:00, in UTC."""
    hours = pl.Series("group", times // _HOUR * _HOUR).cast(pl.Datetime("us")).dt.strftime("%Y-%m-%d %H:00")
    return pl.select(pl.when(pl.Series(times >= 0)).then(hours).otherwise(pl.lit("no time"))).to_series()


def _texts(name: str, values: pa.ChunkedArray) -> pl.Series:
    return pl.select(pl.lit(f"{name}=") + pl.Series(pl.from_arrow(values)).cast(pl.String).fill_null("null")).to_series()


def _blames(
    scorer: StoredScorer, log: ParquetLog, rows: HeldOut, key: Sequence[KeyColumn], places: tuple[Ints, Ints], scores: PairedScores
) -> list[Blame]:
    """
    Args:
        places: of rows that differ, in the log and in the source.
        scores: of the same rows.
    """
    features = logged_features(log, scorer.schema)
    order = np.argsort(places[1])  # as the source gives them
    here, there = places[0][order], places[1][order]
    table = pa.table({name: log.read([name]).column(0).take(pa.array(here)) for name in _columns(scorer.schema, features)})
    served = encode_logged(table, scorer.schema, [], f"--logged {log.path}, rows that differ")
    own, first = [], 0
    for batch in scorer.source(rows, _carrying(scorer.schema, key), has_labels=False).batches():
        wanted = there[(there >= first) & (there < first + len(batch))] - first
        if len(wanted):
            own.append(take_rows(batch, torch.from_numpy(wanted)))
        first += len(batch)
    return blame_features(scorer, join_batches(own), served, features, scores.rows(order))


def _by_row(keys: KeyTable, places: Ints, scores: PairedScores) -> pa.Table:
    columns = {name: column.take(pa.array(places)) for name, column in zip(keys.names, keys.columns, strict=True)}
    for place, task in enumerate(scores.tasks):
        columns |= {f"logged_{task}": pa.array(scores.logged[:, place], from_pandas=True)}
        columns |= {f"replayed_{task}": pa.array(scores.replayed[:, place])}
    return pa.table(columns)


def _worst(keys: KeyTable, places: Ints, scores: PairedScores) -> list[dict[str, Any]]:
    worst, apart = [], scores.apart
    for row in np.argsort(-apart.max(axis=1, initial=0.0), kind="stable")[:_WORST]:
        task = int(np.argmax(apart[row]))
        if not apart[row, task] > 0:
            break
        key = {name: column[int(places[row])].as_py() for name, column in zip(keys.names, keys.columns, strict=True)}
        said, again = float(scores.logged[row, task]), float(scores.replayed[row, task])
        worst.append({"key": key, "task": scores.tasks[task], "logged": said, "replayed": again})
    return worst
