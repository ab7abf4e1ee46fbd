"""Metrics of binary tasks that stream over batches and merge over ranks and shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlenv.datasets.hashing import hash_ids
from mlenv.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_SEGMENT_VALUES = 200
"""Values of one segment column that are reported by name."""
SMALLEST_PREDICTION = 1e-7
"""Log loss reads predictions as at least this far from 0 and 1, so that one saturated float32 is not an infinite loss."""
CALIBRATION_BINS = 20
HISTOGRAM_BINS = 40

_BINS_PER_LOGIT = 2048
_BINS = 32 * _BINS_PER_LOGIT  # logits from -16 to 16, where the smallest prediction lies
_POSITIVES, _NEGATIVES, _PREDICTIONS, _LOSSES, _EXAMPLES = range(5)  # the columns of the sums
_PENDING_CELLS = 1 << 18
_OVERALL = ("", "")


@dataclass(frozen=True)
class ReliabilityCurve:
    """How often the label is positive where the model says that it is; and how often the model says so.

    Invariants: ``predictions``, ``labels`` and ``weights`` have one entry per bin, in order of prediction, each bin with
    about the same weight; ``len(histogram) == len(histogram_edges) - 1``. All are empty for a task without examples.
    """

    predictions: tuple[float, ...] = ()
    """Mean prediction of each bin."""
    labels: tuple[float, ...] = ()
    """Mean label of each bin; equal to the mean prediction where the model is calibrated."""
    weights: tuple[float, ...] = ()
    """Sum of the weights in each bin."""
    histogram_edges: tuple[float, ...] = ()
    """Edges of cells of equal width between 0 and the prediction that 99 % of the weight lies below."""
    histogram: tuple[float, ...] = ()
    """Sum of the weights in each cell; the last one also holds what lies above."""


@final
class BinaryMetrics:
    """Metrics per task, overall and by the values of segment columns, over examples that arrive in any order and place.

    Every sum is kept per fine bin of the prediction's logit (1/2048 wide), so that parts merge by adding up:

    - ``auc``: pairs within one fine bin count half. Measured against the exact value: within 2e-5 at ten thousand
      examples and 2e-6 at a hundred thousand, a few hundred times less than the noise of such a sample; ten times that
      when all logits lie within a few tenths of each other.
    - ``grouped_auc``: the mean over requests of the AUC within the request, weighted by the request's number of
      examples, over the requests that have both classes; ties count half, weights only hide examples. Rows without a
      request do not count. Source: Zhu et al., "Optimized cost per click in Taobao display advertising", KDD 2017.
    - ``log_loss``: mean over the weights, predictions clipped at 1e-7 from 0 and 1; exact.
    - ``normalized_entropy``: log loss / entropy of the base rate; 1 is a model that knows the base rate only.
      Source: He et al., "Practical lessons from predicting clicks on ads at Facebook", ADKDD 2014.
    - ``calibration``: sum of predictions / sum of labels; exact; infinite without positives.
    - ``ece``: mean distance between prediction and label over 20 bins of equal weight, cut at edges of the fine bins.
    - ``base_rate``: mean label. ``examples``: how many examples count, whatever they weigh.

    With one class only, ``auc`` and ``normalized_entropy`` are nan; without examples everything but ``examples`` is.

    Memory: 48 bytes per fine bin in use, of each task and segment value; with a request also 8 bytes a row, 5 per task
    and 4 per segment column.

    Args:
        tasks: names, in the order of the columns of predictions, labels and weights.
        segments: columns of the metadata by whose values every metric is also reported.
        request: column of the metadata that groups rows shown together; no grouped AUC when empty.
    """

    def __init__(self, tasks: Sequence[str], segments: Sequence[str] = (), request: str = "") -> None:
        self.tasks = tuple(tasks)
        self.segments = tuple(segments)
        self.request = request
        # A slice is a value of a segment column, or all rows. A cell is a fine bin of a task of a slice.
        self._slices: dict[tuple[str, str], int] = {_OVERALL: 0}
        self._slice_cells = len(self.tasks) * _BINS
        self._cells: list[Ints] = [np.zeros(0, np.int64)]
        self._sums: list[Floats] = [np.zeros((0, 5))]
        self._row_type = np.dtype(
            [
                ("group", np.uint64),
                ("prediction", np.float32, (len(self.tasks),)),
                ("label", np.int8, (len(self.tasks),)),
                ("slice", np.int32, (len(self.segments),)),
            ]
        )
        self._rows: list[NDArray[np.void]] = [np.zeros(0, self._row_type)]

    def update(self, predictions: Tensor, labels: Tensor, weights: Tensor, metadata: pa.RecordBatch | None = None) -> None:
        """Adds one batch. An example whose weight is 0 does not count for that task, whatever its prediction and label.

        Args:
            predictions: ``(batch, tasks)``, any float type, in [0, 1].
            labels: ``(batch, tasks)``, 0 or 1.
            weights: ``(batch, tasks)``, >= 0.
            metadata: the segment and request columns of the same rows; a null segment value is the segment ``null``.

        Raises:
            DataError: a prediction is not a probability, or the metadata lack a column.
        """
        weight, label = _array(weights), _array(labels)
        counted = weight > 0
        prediction = np.where(counted, _array(predictions), 0.5)
        self._check_predictions(prediction)
        clipped = np.clip(prediction, SMALLEST_PREDICTION, 1 - SMALLEST_PREDICTION)
        log_positive, log_negative = np.log(clipped), np.log1p(-clipped)
        bins = np.floor((log_positive - log_negative) * _BINS_PER_LOGIT).astype(np.int64) + _BINS // 2
        loss = -(label * log_positive + (1 - label) * log_negative)
        sums = np.stack([weight * label, weight * (1 - label), weight * prediction, weight * loss, counted], axis=-1)[counted]

        slices_batch = self._slice_columns(metadata, len(weight))
        cells_of_slice = (np.arange(len(self.tasks)) * _BINS + bins.clip(0, _BINS - 1))[counted]
        rows_counted = np.nonzero(counted)[0]
        for slice_of_row in slices_batch:
            self._add(slice_of_row[rows_counted] * self._slice_cells + cells_of_slice, sums)
        if self.request:
            groups = self._column(metadata, self.request)
            has_group = groups.is_valid().to_numpy(zero_copy_only=False)
            rows = np.zeros(len(weight), self._row_type)[has_group]
            rows["group"] = hash_ids(groups.drop_null() if pa.types.is_integer(groups.type) else groups.drop_null().cast(pa.string()))
            rows["prediction"] = prediction[has_group]
            rows["label"] = np.where(counted, label > 0.5, -1)[has_group]
            rows["slice"] = np.stack(slices_batch, axis=1)[has_group, 1:]
            self._rows.append(rows)

    def merge(self, other: BinaryMetrics) -> None:
        """Adds what another rank or shard has seen; ``other`` stays as it is.

        Raises:
            DataError: ``other`` measures other tasks, segments or requests.
        """
        mine, theirs = (self.tasks, self.segments, self.request), (other.tasks, other.segments, other.request)
        if mine != theirs:
            raise DataError("metrics to merge", expected=f"tasks, segments and request {mine}", received=theirs)
        slices = np.array([self._slice(*key) for key in other._slices])
        cells, sums = other._compacted()
        self._add(self._renumbered(cells, slices), sums)
        rows = np.concatenate(other._rows)
        rows["slice"] = slices[rows["slice"]]
        self._rows.append(rows)

    def state(self) -> dict[str, Any]:
        """All that was seen, as numpy arrays and JSON values; goes between processes or into a file."""
        cells, sums = self._compacted()
        names = {
            "tasks": list(self.tasks),
            "segments": list(self.segments),
            "request": self.request,
            "slices": [list(key) for key in self._slices],
        }
        return {**names, "cells": cells, "sums": sums, "rows": np.concatenate(self._rows)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The inverse of ``state``."""
        metrics = cls(state["tasks"], state["segments"], state["request"])
        metrics._slices = {(column, value): number for number, (column, value) in enumerate(state["slices"])}
        metrics._cells, metrics._sums, metrics._rows = [state["cells"]], [state["sums"]], [state["rows"]]
        return metrics

    def compute(self) -> dict[str, float]:
        """Every metric so far: ``task/metric`` overall, ``task/metric@column=value`` by segment.

        At most 200 values of a segment column are named, those of the largest weight; the rest count together as the
        value ``other``.
        """
        names = self._report_names()
        reports = {name: number for number, name in enumerate(dict.fromkeys(names))}
        report_of_slice = np.array([reports[name] for name in names])
        cells, sums = self._compacted()
        cells, sums = _summed(self._renumbered(cells, report_of_slice), sums)
        ends = np.searchsorted(cells, np.arange(len(reports) * len(self.tasks) + 1) * _BINS)
        grouped_auc = self._grouped_auc(report_of_slice, len(reports)) if self.request else None

        metrics: dict[str, float] = {}
        for name, report in reports.items():
            for number, task in enumerate(self.tasks):
                part = report * len(self.tasks) + number
                figures = _figures(sums[ends[part] : ends[part + 1]])
                if grouped_auc is not None:
                    figures["grouped_auc"] = float(grouped_auc[report, number])
                metrics |= {f"{task}/{metric}{name}": value for metric, value in figures.items()}
        return metrics

    def reliability(self, task: str) -> ReliabilityCurve:
        """The reliability diagram of one task over all rows."""
        cells, sums = self._compacted()
        first = self.tasks.index(task) * _BINS
        start, end = np.searchsorted(cells, [first, first + _BINS])
        sums = sums[start:end]
        if not len(sums):
            return ReliabilityCurve()
        weight, prediction, label = _calibration_bins(sums)
        fine_weight = sums[:, _POSITIVES] + sums[:, _NEGATIVES]
        fine_prediction = sums[:, _PREDICTIONS] / fine_weight
        cumulative = np.cumsum(fine_weight)
        highest = fine_prediction[np.searchsorted(cumulative, 0.99 * cumulative[-1])]
        edges = np.linspace(0, highest or 1.0, HISTOGRAM_BINS + 1)
        histogram = np.histogram(np.minimum(fine_prediction, highest), edges, weights=fine_weight)[0]
        return ReliabilityCurve(*(tuple(values.tolist()) for values in (prediction, label, weight, edges, histogram)))

    def _check_predictions(self, predictions: Floats) -> None:
        wrong = ~((predictions >= 0) & (predictions <= 1))
        if wrong.any():
            row, task = np.argwhere(wrong)[0]
            raise DataError(
                f"predictions of task {self.tasks[task]!r}, row {row} of the batch",
                expected="a probability in [0, 1]",
                received=float(predictions[row, task]),
                fix="pass sigmoid(logits); when they are nan, training has diverged: lower the learning rate or clip the gradients",
            )

    def _column(self, metadata: pa.RecordBatch | None, name: str) -> pa.Array:
        names = metadata.schema.names if metadata is not None else []
        if metadata is None or name not in names:
            raise DataError(
                "metadata of the batch", expected=f"the column {name!r}", received=names, fix="have the source carry the metadata columns"
            )
        return metadata.column(name)

    def _slice(self, column: str, value: str) -> int:
        return self._slices.setdefault((column, value), len(self._slices))

    def _slice_columns(self, metadata: pa.RecordBatch | None, batch_size: int) -> list[Ints]:
        """Slice of every row, overall and then by each segment column."""
        columns = [np.zeros(batch_size, np.int64)]
        for name in self.segments:
            column = self._column(metadata, name)
            plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
            encoded = plain.dictionary_encode(null_encoding="encode")
            values = ("null" if value is None else value for value in encoded.dictionary.cast(pa.string()).to_pylist())
            slices = np.array([self._slice(name, value) for value in values], np.int64)
            columns.append(slices[encoded.indices.to_numpy()])
        return columns

    def _add(self, cells: Ints, sums: Floats) -> None:
        self._cells.append(cells)
        self._sums.append(sums)
        # Waiting for as many new cells as there are old ones keeps the cost of a row constant as the sums grow.
        if sum(map(len, self._cells[1:])) > max(_PENDING_CELLS, len(self._cells[0])):
            self._compacted()

    def _compacted(self) -> tuple[Ints, Floats]:
        """Every cell once, sorted, with its sums."""
        if len(self._cells) > 1:
            cells, sums = _summed(np.concatenate(self._cells), np.concatenate(self._sums))
            self._cells, self._sums = [cells], [sums]
        return self._cells[0], self._sums[0]

    def _renumbered(self, cells: Ints, numbers: Ints) -> Ints:
        """The same bins and tasks, in the slices that ``numbers`` gives for each slice."""
        return numbers[cells // self._slice_cells] * self._slice_cells + cells % self._slice_cells

    def _report_names(self) -> list[str]:
        """What each slice is reported as: the end of its metric keys."""
        cells, sums = self._compacted()
        weights = np.bincount(cells // self._slice_cells, sums[:, _POSITIVES] + sums[:, _NEGATIVES], minlength=len(self._slices))
        names = {0: ""}
        for segment in self.segments:
            slices = [(value, number) for (column, value), number in self._slices.items() if column == segment]
            heaviest_first = sorted(slices, key=lambda slice_: (-weights[slice_[1]], slice_[0]))
            for rank, (value, number) in enumerate(heaviest_first):
                names[number] = f"@{segment}={value if rank < MAX_SEGMENT_VALUES else 'other'}"
        return [names[number] for number in range(len(names))]

    def _grouped_auc(self, report_of_slice: Ints, num_reports: int) -> Floats:
        """``(reports, tasks)``, nan where no group has both classes."""
        rows = np.concatenate(self._rows)
        totals = np.zeros((2, num_reports, len(self.tasks)))  # of AUC times size, and of size
        for task in range(len(self.tasks)):
            counted = rows[rows["label"][:, task] >= 0]
            counted = counted[np.lexsort((counted["prediction"][:, task], counted["group"]))]
            for segment in (None, *range(len(self.segments))):
                report = report_of_slice[counted["slice"][:, segment]] if segment is not None else np.zeros(len(counted), np.int64)
                order = np.argsort(report, kind="stable")
                report, sorted_rows = report[order], counted[order]
                first, auc, size = auc_within_groups(
                    report, sorted_rows["group"], sorted_rows["prediction"][:, task], sorted_rows["label"][:, task]
                )
                totals[:, :, task] += [np.bincount(report[first], values, num_reports) for values in (auc * size, size)]
        with np.errstate(invalid="ignore"):
            means: Floats = totals[0] / totals[1]
        return means


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().cpu().double().numpy()
    return array


def _summed(cells: Ints, sums: Floats) -> tuple[Ints, Floats]:
    """Adds up the rows of equal cells; cells come out sorted."""
    order = np.argsort(cells)
    cells = cells[order]
    starts = np.flatnonzero(np.diff(cells, prepend=-1))
    return cells[starts], np.add.reduceat(sums[order], starts, axis=0)


def _figures(sums: Floats) -> dict[str, float]:
    """Metrics of one task of one slice from the sums of its fine bins, in order of prediction."""
    positives, negatives, predictions, losses, examples = sums.sum(axis=0)
    weight = positives + negatives
    below = np.cumsum(sums[:, _NEGATIVES]) - sums[:, _NEGATIVES] / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        base_rate, log_loss = positives / weight, losses / weight
        entropy = -(base_rate * np.log(base_rate) + (1 - base_rate) * np.log(1 - base_rate))
        figures = {
            "auc": sums[:, _POSITIVES] @ below / (positives * negatives),
            "log_loss": log_loss,
            "normalized_entropy": log_loss / entropy,
            "calibration": predictions / positives,
            "ece": _expected_calibration_error(sums),
            "base_rate": base_rate,
            "examples": examples,
        }
    return {name: float(value) for name, value in figures.items()}


def _expected_calibration_error(sums: Floats) -> float:
    if not len(sums):
        return np.nan
    weight, prediction, label = _calibration_bins(sums)
    return float(weight @ np.abs(prediction - label) / weight.sum())


def _calibration_bins(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """Weight, mean prediction and mean label of bins of about equal weight, each made of whole fine bins."""
    weight = sums[:, _POSITIVES] + sums[:, _NEGATIVES]
    middle = np.cumsum(weight) - weight / 2
    # The nudge keeps a fine bin that lies on a border in the same bin, whatever the order in which its sum was rounded.
    bins = np.floor(CALIBRATION_BINS * middle / weight.sum() + 1e-9)
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    weight = np.add.reduceat(weight, starts)
    return weight, np.add.reduceat(sums[:, _PREDICTIONS], starts) / weight, np.add.reduceat(sums[:, _POSITIVES], starts) / weight


def auc_within_groups(
    report: Ints, group: NDArray[Any], prediction: NDArray[Any], label: NDArray[np.int8]
) -> tuple[NDArray[np.intp], Floats, Floats]:
    """First row, AUC and examples of each group that has both classes. Rows come sorted by report, group, prediction."""
    starts_group = _changes(report) | _changes(group)
    starts_run = starts_group | _changes(prediction)  # a run is the rows of a group that share a prediction
    runs = np.flatnonzero(starts_run)
    group_of_run = np.cumsum(starts_group)[runs] - 1
    positives = np.add.reduceat(label, runs, dtype=np.int64)
    negatives = np.diff(runs, append=len(label)) - positives
    group_positives, group_negatives = np.bincount(group_of_run, positives), np.bincount(group_of_run, negatives)
    negatives_before_group = np.cumsum(group_negatives) - group_negatives
    below = np.cumsum(negatives) - negatives / 2 - negatives_before_group[group_of_run]
    wins = np.bincount(group_of_run, positives * below)
    both = (group_positives > 0) & (group_negatives > 0)
    auc: Floats = wins[both] / (group_positives * group_negatives)[both]
    size = (group_positives + group_negatives)[both].astype(np.float64)
    return np.flatnonzero(starts_group)[both], auc, size


def _changes(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a value differs from the one before; true at the first."""
    changed = np.ones(len(values), np.bool_)
    changed[1:] = values[1:] != values[:-1]
    return changed
