"""Scores that were served against those that a stored model gives now: by row, segment and hour, and the features behind a difference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mlenv.batch_rows import borrow_features, join_batches, take_rows
from mlenv.datasets.times import check_time, microseconds
from mlenv.errors import ConfigError, DataError, check_above, check_at_least, nearest
from mlenv.logged_features import columns_of_features, encode_logged, logged_features
from mlenv.loops.metrics import MAX_SEGMENT_VALUES
from mlenv.page import write_whole
from mlenv.parquet_log import KeyColumn, KeyTable, ParquetLog, common_rows, read_keys
from mlenv.schema import Schema
from mlenv.stored_scorer import HeldOut, StoredScorer

REPLAY_FILE, PAGE_FILE = "replay.json", "replay.html"

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
    """What tells rows apart: columns of the log and of the rows. By default the model's ``schema.row_key``."""
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
class Parity:
    """How well replayed predictions of one task agree with the logged ones in a group of rows."""

    task: str
    group: str
    """Empty for all rows, ``segment=value``, or the hour."""
    num_rows: int
    differs: float
    """Share of the rows that are further apart than the tolerance."""
    logged: float
    """Mean prediction in the log."""
    replayed: float
    apart: float
    """Mean absolute difference."""
    largest: float


@dataclass(frozen=True, kw_only=True)
class Blame:
    """How much of the difference goes away when the replay reads one feature as it was served, in the rows that differ."""

    task: str
    feature: str
    """Empty for all features of the log together."""
    explained: float
    """1 when the replay then says what was logged; 0 when that changes nothing; below 0 when it makes it worse."""
    changed: float
    """Share of the rows that differ in which the replayed prediction moves at all."""


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
    options: ReplayOptions

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


def replay(scorer: StoredScorer, model: str, logged: str, rows: HeldOut | None, options: ReplayOptions) -> Replay:
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
    scores = _score_columns(log, schema, options)
    if options.time:
        log.check_columns([options.time], "the time of a row")
    key = _key(log, schema, rows, options)
    keys = read_keys(log, [pair.first for pair in key])
    available, scores_of_log = logged_features(log, schema), _logged_scores(log, scores)
    side = _replay_log(scorer, log, keys, available) if rows is None else _replay_rows(scorer, rows, key)
    everything = np.arange(log.num_rows)
    places = (everything, everything) if rows is None else common_rows(keys, side.keys)
    times, notes = _times(log, schema, side, places, options)
    tasks = [place for place, task in enumerate(schema.tasks) if task in scores]
    said = scores_of_log[places[0]]
    again = side.predictions[places[1]][:, tasks]
    is_known: NDArray[np.bool_] = np.isnan(said).sum(axis=1) == 0
    apart = np.where(is_known[:, None], np.abs(said - again), 0.0)
    compared = _Compared(list(scores), said, again, is_known, options.tolerance)
    segments = {name: side.columns[name].take(pa.array(places[1])) for name in schema.segments if name in side.columns}
    blames: list[Blame] = []
    differs = np.flatnonzero((apart > options.tolerance).any(axis=1))
    if len(differs) > options.num_blamed:
        differs = np.sort(np.random.default_rng(options.seed).choice(differs, options.num_blamed, replace=False))
    if rows is not None and len(differs) and available:
        table = pa.table({name: log.read([name]).column(0).take(pa.array(places[0][differs])) for name in _columns(schema, available)})
        blames = _blame(scorer, rows, key, table, available, places[1][differs], said[differs], again[differs], tasks, options.tolerance)
    elif rows is not None and len(differs):
        notes.append("the log has no features of the model, so that no feature can be found behind the difference")
    elif len(differs):
        notes.append("the features are those of the log: what differs is the model, its version, or how the server reads values")
    return Replay(
        model=model,
        log=logged,
        rows="the features of the log" if rows is None else f"{rows.path}, {rows.window}",
        num_logged=log.num_rows,
        num_replayed=len(side.predictions),
        num_common=len(places[0]),
        num_without_score=int((~is_known).sum()),
        overall=compared.by(None),
        segments=[one for name, values in segments.items() for one in compared.by(_texts(name, values))],
        hours=[] if times is None else compared.by(_hours(times)),
        blames=blames,
        num_blamed=len(differs) if blames else 0,
        worst=_worst(keys, places[0], list(scores), said, again, apart),
        notes=notes,
        options=options,
    )


def write_replay(found: Replay, folder: Path) -> Path:
    """Writes ``replay.json`` and the page; gives back the page's path."""
    from mlenv.replay_page import render_replay

    folder.mkdir(exist_ok=True)
    write_whole(json.dumps(asdict(found), indent=1, default=str), folder / REPLAY_FILE)
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
    key = options.key or tuple(KeyColumn(name, name) for name in schema.row_key)
    if not options.key and rows is None and not (key and all(pair.first in log.columns for pair in key)):
        key = tuple(KeyColumn(name, name) for name in SERVED_KEY if name in log.columns) or key
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
    source = scorer.source(rows, _carrying(scorer.schema, key))
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
    return np.stack(columns, axis=1).astype(np.float64)


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


class _Compared:
    """Both predictions of every common row."""

    def __init__(self, tasks: Sequence[str], said: Floats, again: Floats, is_known: NDArray[np.bool_], tolerance: float) -> None:
        self._tasks, self._said, self._again, self._is_known, self._tolerance = tasks, said, again, is_known, tolerance

    def by(self, groups: pl.Series | None) -> list[Parity]:
        """Of each value, in order; of many segment values only those with the most rows."""
        names = groups if groups is not None else pl.Series([""]).new_from_index(0, len(self._said))
        found = []
        for place, task in enumerate(self._tasks):
            frame = pl.DataFrame({"group": names, "logged": self._said[:, place], "replayed": self._again[:, place]})
            apart = (pl.col("logged") - pl.col("replayed")).abs()
            grouped = (
                frame.filter(pl.Series(self._is_known))
                .group_by("group")
                .agg(
                    pl.len().alias("num_rows"),
                    (apart > self._tolerance).mean().alias("differs"),
                    pl.col("logged").mean(),
                    pl.col("replayed").mean(),
                    apart.mean().alias("apart"),
                    apart.max().alias("largest"),
                )
            )
            found += [Parity(task=task, **row) for row in grouped.top_k(MAX_SEGMENT_VALUES, by="num_rows").sort("group").to_dicts()]
        return found


def _blame(
    scorer: StoredScorer,
    rows: HeldOut,
    key: Sequence[KeyColumn],
    served: pa.Table,
    available: Sequence[str],
    places: Ints,
    said: Floats,
    again: Floats,
    tasks: Sequence[int],
    tolerance: float,
) -> list[Blame]:
    """Replays the rows that differ with one feature at a time as it was served, and with all of them.

    Args:
        served: the columns of the available features, of these rows.
        places: of these rows in the source, in order of the log.
    """
    order = np.argsort(places)  # as the source gives them
    schema, wanted = scorer.schema, places[order]
    own, first = [], 0
    for batch in scorer.source(rows, _carrying(schema, key)).batches():
        here = wanted[(wanted >= first) & (wanted < first + len(batch))] - first
        if len(here):
            own.append(take_rows(batch, torch.from_numpy(here)))
        first += len(batch)
    logged = join_batches(own)
    lender = encode_logged(served.take(pa.array(order)), schema, [], "--logged, rows that differ")
    said, again, everything = said[order], again[order], torch.arange(len(logged))
    apart = np.abs(said - again)
    counted = apart > tolerance
    blames = []
    for name, features in {"": set(available), **{feature: {feature} for feature in available}}.items():
        mixed = borrow_features(schema, logged, lender, features, everything)
        parts = [scorer(mixed.rows(start, min(start + _CHUNK, len(mixed)))) for start in range(0, len(mixed), _CHUNK)]
        after = torch.cat(parts).double().numpy()[:, list(tasks)]
        left = np.abs(said - after)
        for place, task in enumerate(tasks):
            those = counted[:, place]
            if those.any():
                explained = 1 - float(left[those, place].sum() / apart[those, place].sum())
                moved = float((np.abs(after - again)[those, place] > tolerance).mean())
                blames.append(Blame(task=schema.tasks[task], feature=name, explained=explained, changed=moved))
    return sorted(blames, key=lambda one: (one.feature != "", -one.explained, one.feature))


def _worst(keys: KeyTable, places: Ints, tasks: Sequence[str], said: Floats, again: Floats, apart: Floats) -> list[dict[str, Any]]:
    worst = []
    for row in np.argsort(-apart.max(axis=1, initial=0.0), kind="stable")[:_WORST]:
        place = int(np.argmax(apart[row]))
        if not apart[row, place] > 0:
            break
        key = {name: column[int(places[row])].as_py() for name, column in zip(keys.names, keys.columns, strict=True)}
        worst.append({"key": key, "task": tasks[place], "logged": float(said[row, place]), "replayed": float(again[row, place])})
    return worst
