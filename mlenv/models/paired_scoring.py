"""Two models on the same rows: each reads and scores them its own way, then they are joined by row key."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlenv.batch import Batch
from mlenv.config import GatesConfig
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.errors import ConfigError, DataError
from mlenv.inference.stored_scorer import StoredScorer
from mlenv.loops.metrics import BinaryMetrics
from mlenv.models.bootstrap import Ints, TaskRows
from mlenv.models.gates import Cost, Loss, PairedRows, SegmentColumn
from mlenv.models.missing_features import MissingFeatures, feature_groups
from mlenv.schema import Schema

_REPEATS: Final = 7
_NO_REQUEST: Final = "__request"
_PLACES: Final = ("__challenger", "__champion")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a model said of rows."""

    metadata: pa.Table
    labels: NDArray[np.float64]
    """``(rows, tasks)``."""
    weights: NDArray[np.float64]
    predictions: NDArray[np.float64]
    metrics: Mapping[str, float]
    """As ``metrics.json`` has them."""
    without: Mapping[tuple[str, str], tuple[float, float]]
    """AUC with features and without them, by what they are and task."""
    example: Batch
    """Some of the rows, to take the time of."""


def score(scorer: StoredScorer, source: ParquetSource, gates: GatesConfig) -> Scored:
    """Scores all rows; the first ones also without features, those of an entity together and each core feature."""
    tasks = scorer.schema.tasks
    metrics = BinaryMetrics(tasks, source.schema.segments, source.schema.request)
    missing = _MissingMetrics(scorer, gates)
    example, metadata, parts = None, [], []
    for batch in source.batches():
        predictions = scorer(batch)
        metrics.update(predictions, batch.labels, batch.weights, batch.metadata)
        missing.update(batch, predictions)
        example = example or batch
        metadata.append(batch.metadata)
        parts.append((batch.labels, batch.weights, predictions))
    if example is None:
        raise source.nothing_left()
    labels, weights, scored = (torch.cat(tensors).double().numpy() for tensors in zip(*parts, strict=True))
    return Scored(
        metadata=pa.Table.from_batches(metadata),
        labels=labels,
        weights=weights,
        predictions=scored,
        metrics=metrics.compute(),
        without=missing.compute(),
        example=example,
    )


class _MissingMetrics:
    """What the AUC is when features are missing from a seeded share of the rows."""

    def __init__(self, scorer: StoredScorer, gates: GatesConfig) -> None:
        self._scorer, self._tasks, self._share, self._rows_left = scorer, scorer.schema.tasks, gates.missing_share, gates.missing_rows
        self._groups, self._missing = feature_groups(scorer.schema), MissingFeatures(scorer.schema)
        self._random = torch.Generator().manual_seed(0)
        self._whole = BinaryMetrics(self._tasks)
        self._without = {name: BinaryMetrics(self._tasks) for name in self._groups}

    def update(self, batch: Batch, predictions: Tensor) -> None:
        if self._rows_left <= 0:
            return
        self._rows_left -= len(batch)
        rows = torch.rand(len(batch), generator=self._random) < self._share
        self._whole.update(predictions, batch.labels, batch.weights)
        for name, features in self._groups.items():
            without = self._scorer(self._missing.of(batch, features, rows))
            self._without[name].update(without, batch.labels, batch.weights)

    def compute(self) -> dict[tuple[str, str], tuple[float, float]]:
        whole = self._whole.compute()
        without = {name: metrics.compute() for name, metrics in self._without.items()}
        found = {(name, task): (whole[f"{task}/auc"], without[name][f"{task}/auc"]) for name in without for task in self._tasks}
        return {key: aucs for key, aucs in found.items() if np.isfinite(aucs).all()}


def measure_costs(scorers: Sequence[StoredScorer], scored: Sequence[Scored]) -> list[Cost]:
    """Time of each model as it was trained, on rows of its own."""
    seconds = fastest_in_turns([partial(scorer, rows.example) for scorer, rows in zip(scorers, scored, strict=True)])
    return [
        Cost(milliseconds=1e6 * best / len(rows.example), bytes=scorer.num_bytes)
        for best, scorer, rows in zip(seconds, scorers, scored, strict=True)
    ]


def fastest_in_turns(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each, in turns, so that a busy machine slows all of them; the fastest of several counts."""
    seconds = [float("inf")] * len(calls)
    for _ in range(_REPEATS):
        for place, call in enumerate(calls):
            began = time.perf_counter()
            call()
            seconds[place] = min(seconds[place], time.perf_counter() - began)
    return seconds


def check_row_key(schema: Schema, place: str) -> None:
    """Raises ConfigError when nothing says which rows of two models are the same."""
    if not schema.row_key:
        fix = "name them in schema.row_key, and train again"
        raise ConfigError(f"{place}, schema.row_key", expected="columns that identify a row", received=[], fix=fix)


def pair(challenger: Scored, champion: Scored | None, schema: Schema, champion_tasks: Sequence[str], least_common: float) -> PairedRows:
    """Joins what two models said by row key. Labels and weights are the challenger's.

    Args:
        schema: the challenger's.

    Raises:
        DataError: a row key occurs twice, or too few rows were scored by both.
    """
    places = _joined([challenger] if champion is None else [challenger, champion], schema.row_key, least_common)
    metadata = challenger.metadata.take(pa.array(places[0]))
    requests = codes_of_requests(metadata, schema.request)
    tasks, segments = {}, {}
    for place, task in enumerate(schema.tasks):
        weights = challenger.weights[places[0], place]
        counted = np.flatnonzero(weights > 0)
        predictions = [challenger.predictions[places[0], place][counted]]
        if champion is not None and task in champion_tasks:
            predictions.append(champion.predictions[places[1], champion_tasks.index(task)][counted])
        labels = challenger.labels[places[0], place][counted]
        tasks[task] = TaskRows(labels, weights[counted], tuple(predictions), requests[counted], int(requests.max(initial=-1)) + 1)
        segments[task] = {column: _segment(metadata.column(column), counted) for column in schema.segments}
    lost = [task for task in champion_tasks if task not in schema.tasks]
    return PairedRows(tasks=tasks, segments=segments, lost_tasks=lost)


def _joined(sides: Sequence[Scored], row_key: Sequence[str], least_common: float) -> list[Ints]:
    """Places of the common rows on each side, in the order of the first; all rows of one that is alone, whatever tells them apart."""
    if len(sides) == 1 and not row_key:
        return [np.arange(sides[0].metadata.num_rows)]
    frames = []
    for side, place in zip(sides, _PLACES, strict=False):
        frame = pl.DataFrame(pl.from_arrow(side.metadata.select(list(row_key)))).with_row_index(place)
        twice = frame.filter(pl.struct(row_key).is_duplicated())
        if len(twice):
            received = f"{twice.select(row_key).row(0, named=True)} {len(twice)} times or more"
            fix = "name columns in schema.row_key that tell rows apart, or remove the repeated rows (data.transforms, kind deduplicate)"
            raise DataError(f"row key {list(row_key)}", expected="each once in the rows to compare on", received=received, fix=fix)
        frames.append(frame)
    if len(frames) == 1:
        return [np.arange(len(frames[0]))]
    common = frames[0].join(frames[1], on=list(row_key), how="inner").sort(_PLACES[0])
    share = len(common) / max(len(frame) for frame in frames)
    if share < least_common or not len(common):
        fix = "look at the transforms of both, which leave different rows; or lower gates.common_rows"
        received = f"{len(common):,} of {len(frames[0]):,} and {len(frames[1]):,}"
        raise DataError(f"row key {list(row_key)}", expected=f"{least_common:.0%} of the rows of either model", received=received, fix=fix)
    return [common[place].to_numpy().astype(np.int64) for place in _PLACES]


def codes_of_requests(metadata: pa.Table, request: str) -> Ints:
    """Number of the request of each row; a row without one is a request by itself."""
    if not request:
        return np.arange(metadata.num_rows)
    values = pl.Series(metadata.column(request).cast(pa.string()))
    filled = pl.select(pl.when(values.is_null()).then(pl.lit(_NO_REQUEST) + pl.int_range(len(values)).cast(pl.String)).otherwise(values))
    codes: Ints = filled.to_series().rank("dense").to_numpy().astype(np.int64) - 1
    return codes


def _segment(column: pa.ChunkedArray, rows: Ints) -> SegmentColumn:
    values = column.take(pa.array(rows)).cast(pa.string()).fill_null("null").combine_chunks().dictionary_encode()
    return SegmentColumn(values.dictionary.to_pylist(), values.indices.to_numpy().astype(np.int64))


def missing_losses(challenger: Scored, champion: Scored | None) -> list[Loss]:
    """What both are without features."""
    others = {} if champion is None else champion.without
    return [
        Loss(features=features, task=task, whole=whole, without=without, champion=others.get((features, task), (0.0, None))[1])
        for (features, task), (whole, without) in challenger.without.items()
    ]
