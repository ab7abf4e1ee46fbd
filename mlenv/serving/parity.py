"""A package held against the trainer: every row of a window, as the log stores it, through both."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from mlenv.datasets.encoded_rows import Floats
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.loops.calibration import Calibrator, predictions_from
from mlenv.loops.evaluate import score
from mlenv.loops.metrics import BinaryMetrics
from mlenv.serving.package import GRAPHS, Package
from mlenv.serving.predictor import Predictor
from mlenv.serving.row_transforms import columns_before

TOLERANCE = 1e-5
"""How far a prediction of a package with float32 tables may be from the trainer's."""
JSON_ROWS = 1000
"""Rows that also go through JSON, as a request brings them."""
BATCH_SIZES = (1, 10, 100, 1000)
REPEATS = 50
"""Requests of each size that are timed, after some that are not."""
_FIGURES = ("auc", "normalized_entropy", "log_loss", "calibration")


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a request of so many rows, from columns to predictions, alone on this machine."""

    rows: int
    p50: float
    p99: float
    graph_p50: float
    """Of the numeric graph alone."""


@dataclass(frozen=True)
class Parity:
    """How a package compares with the trainer, by format of its graph."""

    window: str
    rows: int
    tables: str
    differences: dict[str, float]
    """Largest difference of a prediction, over all rows and tasks."""
    rows_apart: dict[str, int]
    """Rows that differ by more than ``TOLERANCE``."""
    json_rows: int
    json_differences: dict[str, float]
    """The same of the first rows, written as JSON and read again."""
    written_difference: float | None
    """Largest difference between the predictions that the training wrote and those of the package's first format."""
    trainer: dict[str, float]
    """Metrics of the trainer's predictions, ``task/metric``."""
    metrics: dict[str, dict[str, float]]
    """Of each format's."""
    bytes: dict[str, int]
    """Size of each graph, the tables included."""
    latency: dict[str, list[Latency]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        lines = [f"compared on {self.rows:,} rows of {self.window}, tables {self.tables}"]
        for form, difference in self.differences.items():
            lines.append(
                f"{form}: largest difference {difference:.2e}, {self.rows_apart[form]} rows apart by more than {TOLERANCE:g}, "
                f"{self.bytes[form] / 1e6:.1f} MB"
            )
            for name, before in self.trainer.items():
                if name.endswith(("/auc", "/normalized_entropy")):
                    lines.append(f"  {name} {before:.5f} -> {self.metrics[form][name]:.5f}")
            lines += [f"  {one.rows} rows: p50 {one.p50:.2f} ms, p99 {one.p99:.2f} ms" for one in self.latency[form]]
        return "\n".join(lines)


def compare(
    model: nn.Module, calibrators: Mapping[str, Calibrator], package: Package, source: ParquetSource, window: str, written: Path | None
) -> Parity:
    """
    Args:
        model, calibrators: as trained, in evaluation mode.
        source: of the window, with metadata.
        written: folder of the predictions that the training wrote for the same window, if there is one.
    """
    tasks = package.schema.tasks
    parts, labels, weights = [], [], []
    for batch, logits in score(model, source):
        parts.append(predictions_from(logits, batch.metadata, tasks, calibrators).numpy())
        labels.append(batch.labels)
        weights.append(batch.weights)
    trainer, targets = np.concatenate(parts), (torch.cat(labels), torch.cat(weights))
    differences: dict[str, float] = {}
    apart: dict[str, int] = {}
    as_json: dict[str, float] = {}
    metrics: dict[str, dict[str, float]] = {}
    latency: dict[str, list[Latency]] = {}
    stored = None
    for form in package.formats:
        predictor = Predictor(package, form)
        served, first, sample = _served(predictor, source)
        differences[form] = _largest(served, trainer)
        apart[form] = int((np.abs(served - trainer) > TOLERANCE).any(1).sum())
        as_json[form] = _largest(first, trainer[: len(first)])
        metrics[form] = _metrics(served, tasks, targets)
        latency[form] = [_latency(predictor, sample, rows) for rows in BATCH_SIZES]
        if stored is None and written is not None:
            stored = _from_written(served, written, tasks)
    return Parity(
        window=window,
        rows=len(trainer),
        tables=str(package.facts["tables"]),
        differences=differences,
        rows_apart=apart,
        json_rows=min(JSON_ROWS, len(trainer)),
        json_differences=as_json,
        written_difference=stored,
        trainer=_metrics(trainer, tasks, targets),
        metrics=metrics,
        bytes={form: _size(package.folder, GRAPHS[form]) for form in package.formats},
        latency=latency,
    )


def _served(predictor: Predictor, source: ParquetSource) -> tuple[Floats, Floats, pa.RecordBatch]:
    """Predictions of all rows; of the first ones by way of JSON; and rows to time requests with."""
    package = predictor.package
    parts, first, sample = [], np.zeros((0, len(predictor.tasks)), np.float32), None
    for plain in requests(package, source):
        parts.append(predictor.predict(plain))
        if len(first) < JSON_ROWS:
            written = json.dumps(_json_rows(plain.slice(0, JSON_ROWS - len(first))))
            first = np.concatenate([first, predictor.predict_rows(json.loads(written))])
        sample = plain if sample is None or sample.num_rows < plain.num_rows else sample
    assert sample is not None
    return np.concatenate(parts), first, sample


def requests(package: Package, source: ParquetSource) -> Iterator[pa.RecordBatch]:
    """The rows of a window as a request has them.

    Args:
        source: of the data of ``keeping``.
    """
    held = columns_before(package.transforms.steps, package.columns.names)
    for rows in source.record_batches(tuple(held.values())):
        yield as_columns(rows.rename_columns(list(held)), package.columns)


def as_columns(rows: pa.RecordBatch, columns: pa.Schema) -> pa.RecordBatch:
    """Columns of a log in the types of a package, values untouched."""
    return pa.RecordBatch.from_arrays([_cast(rows.column(field.name), field.type) for field in columns], schema=columns)


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values if values.type == kind else values.cast(kind)


def _json_rows(rows: pa.RecordBatch) -> list[dict[str, Any]]:
    maps = [field.name for field in rows.schema if pa.types.is_map(field.type)]
    plain: list[dict[str, Any]] = rows.to_pylist()
    for row in plain:
        row |= {name: dict(row[name]) for name in maps if row[name] is not None}
    return plain


def _latency(predictor: Predictor, sample: pa.RecordBatch, rows: int) -> Latency:
    request = pa.concat_batches([sample.slice(0, rows)] * -(-rows // min(rows, sample.num_rows))).slice(0, rows)
    inputs = predictor.inputs(request)

    def timed(call: Any) -> Floats:
        for _ in range(5):
            call()
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return 1000 * np.array(seconds, np.float32)

    whole, graph = timed(lambda: predictor.predict(request)), timed(lambda: predictor.run(inputs))
    return Latency(rows, float(np.median(whole)), float(np.quantile(whole, 0.99)), float(np.median(graph)))


def _metrics(predictions: Floats, tasks: tuple[str, ...], targets: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    metrics = BinaryMetrics(tasks)
    metrics.update(torch.from_numpy(predictions), *targets)
    return {name: figure for name, figure in metrics.compute().items() if name.rpartition("/")[2] in _FIGURES}


def _from_written(served: Floats, folder: Path, tasks: tuple[str, ...]) -> float | None:
    """None where they are of other rows: the window has changed since."""
    table = pq.read_table(folder, columns=[f"prediction_{task}" for task in tasks])
    written = np.stack([column.to_numpy() for column in table.columns], axis=1)
    return _largest(served, written) if written.shape == served.shape else None


def _largest(first: Floats, second: Floats) -> float:
    return float(np.abs(first.astype(np.float64) - second).max(initial=0))


def _size(folder: Path, name: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{name}*"))
