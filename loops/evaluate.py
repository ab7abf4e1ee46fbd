"""Scoring held-out rows while the model is at hand: predictions, metrics, files of predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mlenv.batch import Batch
from mlenv.loops.calibration import Calibrator, predictions_from
from mlenv.loops.fit import BatchSource
from mlenv.loops.metrics import BinaryMetrics, ReliabilityCurve
from mlenv.loops.predictions import PredictionWriter
from mlenv.loops.ranks import is_main, own_rows, rows_of_all


@dataclass(frozen=True)
class Evaluation:
    """What a model is worth on one window."""

    metrics: dict[str, float]
    """``task/metric``, and ``task/metric@column=value`` by segment."""
    best: dict[str, float]
    """The same metrics of the true probabilities, for tasks whose truth the data know: the best that is reachable."""
    reliability: dict[str, ReliabilityCurve]
    """By task."""
    uncalibrated: dict[str, float] = field(default_factory=dict)
    """The metrics of the sigmoid of the logits, all but ``grouped_auc``, of the tasks that have a calibrator."""
    reliability_before: dict[str, ReliabilityCurve] = field(default_factory=dict)
    """Of the same."""


def score(model: nn.Module, source: BatchSource) -> Iterator[tuple[Batch, Tensor]]:
    """Batches with their logits ``(batch, tasks)`` float32, without training; the model's mode is put back.

    Several processes read the same batches, and each computes the logits of its part.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in source.batches():
                logits = model(own_rows(batch).to(device, non_blocking=True))
                yield batch, rows_of_all(logits, len(batch))
    finally:
        model.train(was_training)


def evaluate(
    model: nn.Module, source: BatchSource, predictions: Path | None = None, calibrators: Mapping[str, Calibrator] | None = None
) -> Evaluation:
    """Measures a model, with its calibrators by task, on a source with metadata; with a folder given, its predictions are written there."""
    schema = source.schema
    metrics = BinaryMetrics(schema.tasks, schema.segments, schema.request)
    truths = {task: label.truth for task, label in schema.labels.items() if label.truth}
    best = BinaryMetrics(tuple(truths))
    known = [schema.tasks.index(task) for task in truths]
    calibrators = calibrators or {}
    before = BinaryMetrics(tuple(calibrators), schema.segments)
    calibrated = [schema.tasks.index(task) for task in calibrators]
    with PredictionWriter(predictions, schema.tasks) if predictions and is_main() else nullcontext() as writer:
        for batch, logits in score(model, source):
            scored = predictions_from(logits, batch.metadata, schema.tasks, calibrators)
            metrics.update(scored, batch.labels, batch.weights, batch.metadata)
            if calibrators:
                before.update(
                    torch.sigmoid(logits[:, calibrated]), batch.labels[:, calibrated], batch.weights[:, calibrated], batch.metadata
                )
            if truths and batch.metadata is not None:
                truth = np.stack([batch.metadata.column(column).to_numpy(zero_copy_only=False) for column in truths.values()], axis=1)
                best.update(torch.from_numpy(truth), batch.labels[:, known], batch.weights[:, known], None)
            if writer is not None:
                writer.write(batch, scored)
    return Evaluation(
        metrics.compute(),
        best.compute() if truths else {},
        {task: metrics.reliability(task) for task in schema.tasks},
        before.compute() if calibrators else {},
        {task: before.reliability(task) for task in calibrators},
    )
