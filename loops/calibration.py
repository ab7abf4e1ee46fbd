"""Calibrators of the tasks of a model: fitted on held-out rows, kept with a checkpoint, applied to logits."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlenv.batch import Batch
from mlenv.config import CALIBRATORS, CalibratorConfig
from mlenv.datasets.segments import segment_codes, segment_texts
from mlenv.errors import CheckpointError, MlenvError, PlacedError
from mlenv.kinds import class_of, kind_of
from mlenv.loops.metrics import MAX_SEGMENT_VALUES

logger = logging.getLogger(__name__)

CALIBRATORS_FILE = "calibrators.json"


@dataclass(frozen=True)
class Calibrator:
    """What turns the logits of one task into its predictions."""

    kind: str
    module: nn.Module
    segments: Mapping[str, tuple[str, ...]]
    """Known values by column, in the order of their codes, which begin at 1: those that the metrics name too, 200 at most."""

    def predictions(self, logits: Tensor, metadata: pa.RecordBatch | None) -> Tensor:
        """
        Args:
            logits: ``(batch,)``.
            metadata: the segment columns of the same rows, if there are any.

        Returns:
            ``(batch,)`` float32 in (0, 1).
        """
        if not self.segments:
            return self.module(logits)  # type: ignore[no-any-return]
        codes = [segment_codes(segment_texts(metadata, column), values) for column, values in self.segments.items()]
        return self.module(logits, torch.from_numpy(np.stack(codes, axis=1)))  # type: ignore[no-any-return]


def predictions_from(
    logits: Tensor, metadata: pa.RecordBatch | None, tasks: Iterable[str], calibrators: Mapping[str, Calibrator]
) -> Tensor:
    """Predictions ``(batch, tasks)`` float32 in (0, 1), calibrated where the task has a calibrator."""
    if not calibrators:
        return torch.sigmoid(logits)
    columns = zip(tasks, logits.cpu().unbind(1), strict=True)
    return torch.stack(
        [calibrators[task].predictions(column, metadata) if task in calibrators else torch.sigmoid(column) for task, column in columns],
        dim=1,
    )


def fit_calibrators(
    configs: Mapping[str, CalibratorConfig], tasks: tuple[str, ...], scored: Iterable[tuple[Batch, Tensor]]
) -> dict[str, Calibrator]:
    """Fits the calibrators of the tasks that are named. A task with too little to fit on is left out, and a warning says why:
    the model behind it may have taken days, and is worth measuring without.

    Args:
        scored: batches of held-out rows with their logits ``(batch, tasks)``; not read when nothing is to be fitted.
    """
    columns = {column for config in configs.values() for column in config.segments}
    held_out = _Rows(scored if any(config.needs_labels for config in configs.values()) else (), len(tasks), sorted(columns))
    fitted = {}
    for task, config in configs.items():
        columns_of_task = (values[:, tasks.index(task)] for values in (held_out.logits, held_out.labels, held_out.weights))
        logits, labels, weights = (values.astype(np.float64) for values in columns_of_task)
        segments = {column: _heaviest(held_out.segments[column], weights) for column in config.segments}
        codes = (
            np.stack([segment_codes(held_out.segments[column], values) for column, values in segments.items()], axis=1)
            if segments
            else None
        )
        try:
            fitted[task] = Calibrator(kind_of(config, CALIBRATORS), config.fit(logits, labels, weights, codes), segments)
        except MlenvError as error:
            placed = error.under(f"calibration.{task}") if isinstance(error, PlacedError) else error
            logger.warning("%s The task keeps the sigmoid of its logits.", placed)
    return fitted


def calibrators_to_json(calibrators: Mapping[str, Calibrator]) -> str:
    """All that the calibrators are, with every digit."""
    plain = {
        task: {
            "kind": calibrator.kind,
            "segments": calibrator.segments,
            "buffers": {name: buffer.tolist() for name, buffer in calibrator.module.state_dict().items()},
        }
        for task, calibrator in calibrators.items()
    }
    return json.dumps(plain, indent=2)


def calibrators_from_json(text: str, configs: Mapping[str, CalibratorConfig], place: str) -> dict[str, Calibrator]:
    """The inverse of ``calibrators_to_json``.

    Args:
        configs: of the config at hand, for classes of the user's own: a checkpoint alone does not get code imported.

    Raises:
        CheckpointError: a calibrator is of a kind that neither mlenv nor the config has.
    """
    own = {kind_of(config, CALIBRATORS): type(config) for config in configs.values()}
    calibrators = {}
    for task, plain in json.loads(text).items():
        kind = plain["kind"]
        if kind not in CALIBRATORS and kind not in own:
            fix = f"name it in calibration.{task}.kind"
            raise CheckpointError(f"{place}, {task}", expected=f"a kind of {[*CALIBRATORS, *own]}", received=kind, fix=fix)
        config: Any = own.get(kind) or class_of(kind, CALIBRATORS, f"calibration.{task}")
        segments = {column: tuple(values) for column, values in plain["segments"].items()}
        calibrators[task] = Calibrator(kind, config.calibrator(**plain["buffers"]), segments)
    return calibrators


class _Rows:
    """All held-out rows in memory: 12 bytes a row and task, and the segment columns."""

    def __init__(self, scored: Iterable[tuple[Batch, Tensor]], num_tasks: int, columns: list[str]) -> None:
        parts: list[list[NDArray[np.float32]]] = [[np.zeros((0, num_tasks), np.float32)] for _ in range(3)]
        texts: dict[str, list[pa.Array]] = {column: [] for column in columns}
        for batch, logits in scored:
            for part, tensor in zip(parts, (logits, batch.labels, batch.weights), strict=True):
                part.append(tensor.cpu().numpy())
            for column in columns:
                texts[column].append(segment_texts(batch.metadata, column))
        self.logits, self.labels, self.weights = (np.concatenate(part) for part in parts)
        self.segments = {column: pa.chunked_array(values, pa.string()) for column, values in texts.items()}


def _heaviest(values: pa.ChunkedArray, weights: NDArray[np.float64]) -> tuple[str, ...]:
    """Values of the largest weight; a rarer one counts as unseen."""
    counts = pa.table({"value": values, "weight": weights}).group_by("value").aggregate([("weight", "sum")])
    counts = counts.filter(pc.and_(pc.is_valid(counts["value"]), pc.greater(counts["weight_sum"], 0)))
    counts = counts.sort_by([("weight_sum", "descending"), ("value", "ascending")])
    return tuple(counts["value"].to_pylist()[:MAX_SEGMENT_VALUES])
