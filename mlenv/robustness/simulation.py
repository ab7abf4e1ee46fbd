"""How far predictions and metrics of a stored model move when its features go missing, grow old or are wrong."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlenv.batch import Batch
from mlenv.datasets.encoded_rows import tell_apart
from mlenv.datasets.parquet_source import NoFilesError
from mlenv.datasets.times import check_time
from mlenv.errors import ConfigError, check_at_least, nearest
from mlenv.inference.batch_rows import join_batches
from mlenv.inference.stored_scorer import HeldOut, StoredScorer
from mlenv.models.bootstrap import Ints, TaskRows, resample, spread
from mlenv.models.missing_features import feature_groups
from mlenv.pages.page import write_whole
from mlenv.robustness.corruptions import Corruption, Corruptions, HeldRows, busiest_hours, draw_rows, entity_columns, find_day_before
from mlenv.schema import Schema

SIMULATION_FILE, PAGE_FILE = "simulation.json", "simulation.html"

_CHUNK: Final = 8192
"""Rows that are scored at once."""
_INTERVAL: Final = 1.96
"""Standard deviations to either side; 95 %."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SimulationOptions:
    share: float = 0.2
    """Of the rows that are hit."""
    features: tuple[str, ...] = ()
    """Only these; all when empty."""
    kinds: tuple[Corruption, ...] = get_args(Corruption)
    """What happens to a feature."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Features that go missing together, by a name for each group, beside the features of each entity."""
    peak_hours: int = 4
    """Hours of the day, those with the most rows, in all rows of which a group goes missing; 0 leaves this out."""
    num_rows: int = 100_000
    """Rows that are read at most, the first ones; and as many of the days before."""
    history_days: int = 3
    """Days before the rows in which stale values are looked for."""
    resamples: int = 50
    """Draws of requests that the intervals come from."""
    seed: int = 0
    """Of the rows that are hit."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError("--share", expected="a share of the rows, above 0 and at most 1", received=self.share)
        for kind in self.kinds:
            if kind not in get_args(Corruption):
                raise ConfigError("--kinds", expected="kinds of corruption", received=kind, fix=nearest(kind, get_args(Corruption)))
        for name, least in (("peak_hours", 0), ("num_rows", 1), ("history_days", 0), ("resamples", 2)):
            check_at_least(name, getattr(self, name), least)
        check_at_least("peak_hours", 24 - self.peak_hours, 0)


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What became of one task when some features were corrupted."""

    kind: str
    """A kind of corruption, or ``missing at peak``."""
    subject: str
    """Feature, or what a group of them is called."""
    is_group: bool
    task: str
    reached: float
    """Share of the rows whose values were replaced; fewer than were hit where an entity has no older value."""
    move: float
    """Mean absolute change of the prediction, over all rows."""
    relative_move: float
    """Mean of that change over the prediction before."""
    auc: float
    auc_change: float
    auc_low: float
    """Of the interval of the change, from requests drawn anew."""
    auc_high: float
    entropy_change: float
    """Of normalized entropy."""
    calibration: float
    """Afterwards."""

    @property
    def kept(self) -> float:
        """Share that is left of what the AUC has above 0.5."""
        before = self.auc - self.auc_change - 0.5
        return (self.auc - 0.5) / before if before > 0 else math.nan


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """All that was tried on one model."""

    model: str
    rows: str
    num_rows: int
    num_earlier: int
    """Rows of the days before that were read for stale values."""
    whole: Mapping[str, Mapping[str, float]]
    """Metrics with every feature as it is, by task."""
    effects: Sequence[Effect]
    notes: Sequence[str]
    """What could not be tried, and why."""
    options: SimulationOptions

    @property
    def stability(self) -> dict[str, float]:
        """By feature, most fragile first: the smallest ``kept`` over the tasks when the feature is missing; 1 is indifferent."""
        scores: dict[str, float] = {}
        for effect in self.effects:
            if effect.kind == "missing" and not effect.is_group and math.isfinite(effect.kept):
                scores[effect.subject] = min(effect.kept, scores.get(effect.subject, math.inf))
        return dict(sorted(scores.items(), key=lambda score: (score[1], score[0])))

    def to_plain(self) -> dict[str, object]:
        return {**asdict(self), "stability": self.stability}


@dataclass(frozen=True)
class _Scenario:
    kind: str
    corruption: Corruption
    subject: str
    features: frozenset[str]
    rows: Tensor
    is_group: bool = False


def simulate(scorer: StoredScorer, name: str, rows: HeldOut, options: SimulationOptions) -> Simulation:
    """Scores rows as they are, and then corrupted in every way that the options ask for.

    Args:
        name: of the model, for people.

    Raises:
        ConfigError: a feature is unknown to the model.
        DataError: rows cannot be read.
    """
    check_features(scorer.schema, options)
    held, notes = _read(scorer, rows, options)
    corruptions = Corruptions(scorer.schema, held, options.seed)
    before = _scored(scorer, held.batch)
    measured = _Measured(scorer.schema, held.batch, before, options)
    effects: list[Effect] = []
    for scenario in _scenarios(scorer.schema, held, corruptions, options):
        corrupted, reached = corruptions.of(scenario.corruption, scenario.features, scenario.rows)
        effects += measured.effects(scenario, reached, _scored(scorer, corrupted))
    return Simulation(
        model=name,
        rows=f"{rows.path}, {rows.window}",
        num_rows=len(held.batch),
        num_earlier=len(held.pool) - len(held.batch),
        whole=measured.whole,
        effects=effects,
        notes=notes,
        options=options,
    )


def check_features(schema: Schema, options: SimulationOptions) -> None:
    """
    Raises:
        ConfigError: a feature is unknown to the model.
    """
    named = [("--features", feature) for feature in options.features]
    named += [(f"--group {group}", feature) for group, features in options.groups.items() for feature in features]
    for place, feature in named:
        if feature not in schema.features:
            fix = nearest(feature, schema.features)
            raise ConfigError(place, expected="features of the model", received=feature, fix=fix)


def write_simulation(simulation: Simulation, folder: Path) -> Path:
    """Writes ``simulation.json`` and the page; gives back the page's path."""
    from mlenv.robustness.simulation_page import render_simulation

    folder.mkdir(exist_ok=True)
    write_whole(json.dumps(simulation.to_plain(), indent=1), folder / SIMULATION_FILE)
    write_whole(render_simulation(simulation), folder / PAGE_FILE)
    return folder / PAGE_FILE


def _read(scorer: StoredScorer, rows: HeldOut, options: SimulationOptions) -> tuple[HeldRows, list[str]]:
    """The rows, and those of the days before for stale values, with the columns of the entities' ids."""
    schema, notes = scorer.schema, []
    entities = entity_columns(schema) if "stale" in options.kinds and schema.event_time else {}
    if not schema.event_time:
        notes.append("nothing is stale, and nothing is missing at peak: the model's schema has no event_time")
    elif "stale" in options.kinds and not entities:
        notes.append("nothing is stale: the model's schema has no categorical feature with the entity user or item")
    carried = replace(schema, segments=tuple(dict.fromkeys([*schema.segments, *entities.values()])))
    batch = _first_rows(scorer, rows, carried, options.num_rows)
    if schema.event_time and batch.metadata is not None:
        check_time("schema.event_time", schema.event_time, batch.metadata.schema.field(schema.event_time).type)
    history = _days_before(rows, options.history_days) if entities else None
    earlier: list[Batch] = []
    if history is not None:
        try:
            earlier = [_first_rows(scorer, history, carried, options.num_rows)]
        except NoFilesError:
            notes.append(f"stale values come from the rows alone: the data set has no rows in {history.window}")
    pool = join_batches([*earlier, batch])
    assert pool.metadata is not None
    before = {
        entity: find_day_before(pool.metadata, len(pool) - len(batch), column, schema.event_time) for entity, column in entities.items()
    }
    return HeldRows(batch=batch, pool=pool, day_before=before), notes


def _first_rows(scorer: StoredScorer, rows: HeldOut, carried: Schema, at_most: int) -> Batch:
    source = scorer.source(rows, carried)
    batches, missing = [], at_most
    for batch in source.batches():
        batches.append(batch.rows(0, min(missing, len(batch))))
        missing -= len(batches[-1])
        if missing <= 0:
            break
    if not batches:
        raise source.nothing_left()
    return join_batches(batches)


def _days_before(rows: HeldOut, num_days: int) -> HeldOut | None:
    """The days before the first one; None where nothing says which that is, as all of the past is among the rows then."""
    if not rows.window.start or not num_days:
        return None
    start = datetime.date.fromisoformat(rows.window.start)
    first, last = (start - datetime.timedelta(days=days) for days in (num_days, 1))
    return replace(rows, window=replace(rows.window, start=first.isoformat(), end=last.isoformat()))


def _scenarios(schema: Schema, held: HeldRows, corruptions: Corruptions, options: SimulationOptions) -> Iterator[_Scenario]:
    drawn = torch.from_numpy(draw_rows(len(held.batch), options.share, options.seed))
    for feature in options.features or schema.features:
        for kind in options.kinds:
            if corruptions.can(kind, feature):
                yield _Scenario(kind, kind, feature, frozenset({feature}), drawn)
    for name, features in _groups(schema, options).items():
        yield _Scenario("missing", "missing", name, features, drawn, is_group=True)
        if options.peak_hours and schema.event_time and held.batch.metadata is not None:
            _, at_peak = busiest_hours(held.batch.metadata, schema.event_time, options.peak_hours)
            yield _Scenario("missing at peak", "missing", name, features, at_peak, is_group=True)


def _groups(schema: Schema, options: SimulationOptions) -> dict[str, frozenset[str]]:
    """All features of each entity, where all of them are asked for, and what the options name."""
    wanted = set(options.features or schema.features)
    whole = {name: group for name, group in feature_groups(schema).items() if not name.startswith("core feature ") and group <= wanted}
    return whole | {name: frozenset(features) for name, features in options.groups.items()}


def _scored(scorer: StoredScorer, batch: Batch) -> Floats:
    """``(rows, tasks)``."""
    parts = [scorer(batch.rows(first, min(first + _CHUNK, len(batch)))) for first in range(0, len(batch), _CHUNK)]
    predictions: Floats = torch.cat(parts).double().numpy()
    return predictions


class _Measured:
    """Rows as they are, to measure every other version of them against."""

    def __init__(self, schema: Schema, batch: Batch, before: Floats, options: SimulationOptions) -> None:
        self._before, self._options = before, options
        requests = _request_codes(batch.metadata, schema.request, len(batch))
        self._rows: dict[str, TaskRows] = {}
        self._counted: dict[str, Ints] = {}
        for place, task in enumerate(schema.tasks):
            weights = batch.weights[:, place].double().numpy()
            counted = np.flatnonzero(weights > 0)
            labels = batch.labels[:, place].double().numpy()[counted]
            rows = TaskRows(labels, weights[counted], (before[counted, place],), requests[counted], int(requests.max(initial=-1)) + 1)
            self._rows[task], self._counted[task] = rows, counted
        self.whole = {task: self._figures(task)[0] for task in schema.tasks}

    def effects(self, scenario: _Scenario, reached: Tensor, after: Floats) -> Iterator[Effect]:
        for place, task in enumerate(self._rows):
            figures, deviation = self._figures(task, after[self._counted[task], place])
            change = figures["auc"] - self.whole[task]["auc"]
            moves = np.abs(after[:, place] - self._before[:, place])
            yield Effect(
                kind=scenario.kind,
                subject=scenario.subject,
                is_group=scenario.is_group,
                task=task,
                reached=float(reached.double().mean()),
                move=float(moves.mean()),
                relative_move=float((moves / np.maximum(self._before[:, place], 1e-9)).mean()),
                auc=figures["auc"],
                auc_change=change,
                auc_low=change - _INTERVAL * deviation,
                auc_high=change + _INTERVAL * deviation,
                entropy_change=figures["normalized_entropy"] - self.whole[task]["normalized_entropy"],
                calibration=figures["calibration"],
            )

    def _figures(self, task: str, after: Floats | None = None) -> tuple[dict[str, float], float]:
        """Metrics of the corrupted rows, or of those as they are; and how far the change of the AUC is off by chance."""
        rows = self._rows[task]
        nothing = {"auc": math.nan, "normalized_entropy": math.nan, "calibration": math.nan}
        if not len(rows.labels):
            return nothing, math.nan
        if after is not None:
            rows = replace(rows, predictions=(*rows.predictions, after))
        num_draws = 0 if after is None else self._options.resamples
        groups = np.zeros(len(rows.labels), np.int64)
        found = resample(rows, groups, 1, num_draws=num_draws, seed=self._options.seed)
        figures = {name: float(found[name].values[-1, 0]) for name in nothing}
        draws = found["auc"].draws
        return figures, float(spread(draws[:, 1, 0] - draws[:, 0, 0])) if num_draws else math.nan


def _request_codes(metadata: pa.RecordBatch | None, request: str, num_rows: int) -> Ints:
    """Number of the request of each row; a row without one is a request by itself."""
    if not request or metadata is None:
        return np.arange(num_rows)
    codes = pc.fill_null(metadata.column(request).cast(pa.string()).dictionary_encode().indices.cast(pa.int64()), -1)
    numbers: Ints = np.unique(tell_apart(codes.to_numpy()), return_inverse=True)[1].astype(np.int64)
    return numbers
