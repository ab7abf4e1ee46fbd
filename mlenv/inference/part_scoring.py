"""Scores a part of the rows with every model: one row out for each row in, the same bits whoever does it and whenever."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlenv.batch import START
from mlenv.datasets.encoded_rows import to_batch
from mlenv.datasets.hashing import hash_rows
from mlenv.datasets.parquet_source import LoggedRows, ParquetSource, RowGroup
from mlenv.inference.stored_scorer import StoredScorer
from mlenv.loops.metrics import BinaryMetrics

BATCH_ROWS: Final = 2048
"""Rows of a batch. Sums may be rounded otherwise in batches of another size, so that each part is cut the same way every time."""


@dataclass(frozen=True)
class Part:
    """What is scored, written and, after a kill, done again at once: row groups of one file that follow one another."""

    name: str
    """Of the file that is written."""
    groups: tuple[RowGroup, ...]

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.groups)


@dataclass(frozen=True)
class Reading:
    """Models that read the rows in the same way, so that they are read once for all of them."""

    source: ParquetSource
    models: tuple[str, ...]


@dataclass(frozen=True)
class Tally:
    """What is known of the rows of a part that is scored."""

    num_rows: int
    num_scored: Mapping[str, int]
    """Rows that a model's transforms leave, by model."""
    keys: NDArray[np.uint64]
    """A hash of the row key of each row."""
    metrics: Mapping[str, BinaryMetrics]
    """By model; of nothing without labels."""


@dataclass(frozen=True)
class ScoredPart:
    """A part with its predictions."""

    part: Part
    file: pa.Buffer
    """A whole Parquet file."""
    tally: Tally


def divide(groups: Iterable[RowGroup], least_rows: int) -> list[Part]:
    """Parts of at least so many rows, but for the last ones of files."""
    pieces: list[list[RowGroup]] = []
    for _, of_file in groupby(groups, key=lambda group: group.file):
        room = 0
        for group in of_file:
            if room <= 0:
                pieces.append([])
                room = least_rows
            pieces[-1].append(group)
            room -= group.num_rows
    return [Part(f"part-{number:05}.parquet", tuple(piece)) for number, piece in enumerate(pieces)]


class PartScorer:
    """All models with what reads the rows for them.

    Args:
        scorers: by the name that ends the columns of a model when there are several.
        readings: those of the first model come first; its row key tells rows apart.
    """

    def __init__(self, scorers: Mapping[str, StoredScorer], readings: Sequence[Reading], *, has_labels: bool) -> None:
        self.scorers, self.readings, self.has_labels = scorers, readings, has_labels
        self.row_key = next(iter(scorers.values())).schema.row_key
        self._ends = {name: f"@{name}" if len(scorers) > 1 else "" for name in scorers}

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Columns that a model gives, by its name."""
        kinds = ("label", "weight", "prediction") if self.has_labels else ("prediction",)
        return {
            name: tuple(f"{kind}_{task}{self._ends[name]}" for task in scorer.schema.tasks for kind in kinds)
            for name, scorer in self.scorers.items()
        }

    def replica(self) -> PartScorer:
        """For another thread."""
        return PartScorer({name: scorer.replica() for name, scorer in self.scorers.items()}, self.readings, has_labels=self.has_labels)

    def __call__(self, part: Part) -> ScoredPart:
        """
        Raises:
            DataError: a row cannot be read or used.
        """
        passed: dict[str, Any] = {}
        given: dict[str, pa.Array] = {}
        for reading in self.readings:
            logged = reading.source.logged(part.groups)
            passed |= {name: logged.metadata.column(name) for name in logged.metadata.column_names if name not in passed}
            given |= self._model_columns(reading.models, logged)
        table = pa.table(passed | {name: given[name] for names in self.columns.values() for name in names})
        assert table.num_rows == part.num_rows
        file = pa.BufferOutputStream()
        pq.write_table(table, file, compression="zstd")
        return ScoredPart(part, file.getvalue(), self.tally(table))

    def tally(self, rows: pa.Table) -> Tally:
        """Of rows with their predictions, just computed or read back."""
        batch = rows.combine_chunks().to_batches()[0]
        scored, metrics = {}, {}
        for name, scorer in self.scorers.items():
            schema, tasks, end = scorer.schema, scorer.schema.tasks, self._ends[name]
            first = batch.column(f"prediction_{tasks[0]}{end}")
            own = batch.filter(first.is_valid()) if first.null_count else batch
            scored[name] = len(own)
            metrics[name] = BinaryMetrics(tasks, schema.segments, schema.request)
            if self.has_labels:
                kinds = ("prediction", "label", "weight")
                predictions, labels, weights = (_stacked([own.column(f"{kind}_{task}{end}") for task in tasks]) for kind in kinds)
                metrics[name].update(predictions, labels, weights, own)
        return Tally(len(batch), scored, hash_rows([batch.column(name) for name in self.row_key]), metrics)

    def _model_columns(self, names: Sequence[str], logged: LoggedRows) -> dict[str, pa.Array]:
        """What some models say of rows, beside their labels; null and without weight where the transforms leave a row out."""
        tasks = self.scorers[names[0]].schema.tasks
        predictions = self._predictions(names, logged)
        columns = {}
        for name in names:
            for place, task in enumerate(tasks):
                values = {"prediction": predictions[name][:, place]}
                if self.has_labels:
                    values |= {"label": logged.encoded.labels[:, place], "weight": logged.encoded.weights[:, place]}
                for kind, column in values.items():
                    columns[f"{kind}_{task}{self._ends[name]}"] = _spread(column, logged, is_null=kind == "prediction")
        return columns

    def _predictions(self, names: Sequence[str], logged: LoggedRows) -> dict[str, NDArray[np.float32]]:
        """``(rows, tasks)`` by model, of the rows that the transforms leave."""
        parts: dict[str, list[Tensor]] = {name: [torch.zeros(0, len(self.scorers[name].schema.tasks))] for name in names}
        metadata = _calibrated_on(logged) if any(scorer.calibrators for scorer in map(self.scorers.__getitem__, names)) else None
        with torch.inference_mode():
            for first, last in _cuts(len(logged.encoded)):
                batch = to_batch([logged.encoded.rows(first, last)], START)
                if metadata is not None:
                    batch = replace(batch, metadata=metadata.slice(first, last - first))
                for name in names:
                    parts[name].append(self.scorers[name](batch))
        return {name: torch.cat(predictions).numpy() for name, predictions in parts.items()}


def _cuts(num_rows: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + BATCH_ROWS, num_rows)) for first in range(0, num_rows, BATCH_ROWS))


def _calibrated_on(logged: LoggedRows) -> pa.RecordBatch:
    """Metadata of the rows that the transforms leave."""
    rows = logged.metadata if logged.kept is None else logged.metadata.take(pa.array(logged.kept))
    return pa.RecordBatch.from_struct_array(rows.to_struct_array().combine_chunks())


def _spread(values: NDArray[np.float32], logged: LoggedRows, *, is_null: bool) -> pa.Array:
    """A value for every row; where there is none null, or else 0."""
    if logged.kept is None:
        return pa.array(values)
    spread, is_left_out = np.zeros(logged.metadata.num_rows, np.float32), np.ones(logged.metadata.num_rows, bool)
    spread[logged.kept], is_left_out[logged.kept] = values, False
    return pa.array(spread, mask=is_left_out if is_null else None)


def _stacked(columns: Sequence[pa.Array]) -> Tensor:
    """``(rows, columns)`` float32."""
    return torch.from_numpy(np.stack([column.to_numpy(zero_copy_only=False) for column in columns], axis=1))
