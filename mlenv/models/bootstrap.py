"""How far a metric would have come out otherwise with other requests: requests are drawn anew, and all is measured again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlenv.loops.metrics import SMALLEST_PREDICTION, auc_within_groups

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEAST_DRAWS = 0.9
"""Share of the draws that a metric must exist in; a draw may leave a small group without a positive."""


@dataclass(frozen=True)
class TaskRows:
    """Labels and predictions of one task, row by row the same examples for every model."""

    labels: Floats
    """0 or 1."""
    weights: Floats
    """> 0."""
    predictions: tuple[Floats, ...]
    """Of each model."""
    requests: Ints
    """Which request a row belongs to: from 0 on, and rows of one number are drawn together."""
    num_requests: int

    def where(self, kept: NDArray[np.bool_]) -> TaskRows:
        """Some of the rows, of the same requests."""
        predictions = tuple(values[kept] for values in self.predictions)
        return TaskRows(self.labels[kept], self.weights[kept], predictions, self.requests[kept], self.num_requests)


@dataclass(frozen=True)
class Resampled:
    """A metric of several models over several groups of rows."""

    values: Floats
    """``(models, groups)``, as measured; nan where it is not defined."""
    draws: Floats
    """``(draws, models, groups)``."""


def resample(rows: TaskRows, groups: Ints, num_groups: int, *, num_draws: int, seed: int = 0) -> dict[str, Resampled]:
    """Measures ``auc``, ``normalized_entropy``, ``calibration``, and over all rows ``grouped_auc``, of every model.

    Args:
        groups: group of each row, such as a segment's value; every group from 0 on has rows.
        seed: of the draws. The same one draws the same requests, whatever the groups and the models.
    """
    measures = [_Measure(rows, predictions, groups, num_groups) for predictions in rows.predictions]
    ones = np.ones(rows.num_requests)
    names = list(measures[0].figures(ones))
    values = {name: np.stack([measure.figures(ones)[name] for measure in measures]) for name in names}
    draws = {name: np.empty((num_draws, len(measures), num_groups)) for name in names}
    random = np.random.default_rng(seed)
    for draw in range(num_draws):
        drawn = random.integers(0, rows.num_requests, rows.num_requests)
        counts = np.bincount(drawn, minlength=rows.num_requests).astype(np.float64)
        for place, measure in enumerate(measures):
            for name, figures in measure.figures(counts).items():
                draws[name][draw, place] = figures
    return {name: Resampled(values[name], draws[name]) for name in names}


def spread(draws: Floats) -> Floats:
    """Standard deviation over the first axis; nan where too few draws have a value."""
    finite = np.isfinite(draws)
    enough = finite.mean(axis=0) >= LEAST_DRAWS
    deviation: Floats = np.full(draws.shape[1:], np.nan)
    deviation[enough] = np.nanstd(np.where(finite, draws, np.nan)[:, enough], axis=0, ddof=1)
    return deviation


class _Measure:
    """One model's rows, sorted once by group and prediction, so that a draw is a few sums over them."""

    def __init__(self, rows: TaskRows, predictions: Floats, groups: Ints, num_groups: int) -> None:
        order = np.lexsort((predictions, groups))
        group, prediction = groups[order], predictions[order]
        labels, weights = rows.labels[order], rows.weights[order]
        clipped = np.clip(prediction, SMALLEST_PREDICTION, 1 - SMALLEST_PREDICTION)
        self._requests = rows.requests[order]
        self._positives, self._negatives = weights * labels, weights * (1 - labels)
        self._losses = -(self._positives * np.log(clipped) + self._negatives * np.log1p(-clipped))
        self._predictions = weights * prediction
        starts_group = np.diff(group, prepend=-1) > 0
        starts_run = starts_group | (np.diff(prediction, prepend=-1.0) != 0)  # a run: rows of a group that share a prediction
        self._runs, self._groups = np.flatnonzero(starts_run), np.flatnonzero(starts_group)
        self._first_runs = np.flatnonzero(starts_group[self._runs])
        self._group_of_run = group[self._runs]
        self._within = _within_requests(rows, predictions) if num_groups == 1 else None

    def figures(self, counts: Floats) -> dict[str, Floats]:
        """``(groups,)`` by metric, with each request so many times."""
        times = counts[self._requests]
        positives, negatives = (np.add.reduceat(values * times, self._runs) for values in (self._positives, self._negatives))
        losses, predictions = (np.add.reduceat(values * times, self._groups) for values in (self._losses, self._predictions))
        all_positives, all_negatives = (np.add.reduceat(values, self._first_runs) for values in (positives, negatives))
        before_group = (np.cumsum(all_negatives) - all_negatives)[self._group_of_run]
        below = np.cumsum(negatives) - negatives / 2 - before_group
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = all_positives + all_negatives
            rate = all_positives / weights
            entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
            figures = {
                "auc": np.add.reduceat(positives * below, self._first_runs) / (all_positives * all_negatives),
                "normalized_entropy": losses / weights / entropy,
                "calibration": predictions / all_positives,
            }
            if self._within is not None:
                request, auc, size = self._within
                drawn = counts[request] * size
                figures["grouped_auc"] = np.array([drawn @ auc / drawn.sum()]) if len(drawn) else np.array([np.nan])
        return figures


def _within_requests(rows: TaskRows, predictions: Floats) -> tuple[Ints, Floats, Floats]:
    """Request, AUC and examples of each request that has both classes."""
    order = np.lexsort((predictions, rows.requests))
    requests = rows.requests[order]
    labels = (rows.labels[order] > 0.5).astype(np.int8)
    nothing: Any = np.zeros(len(order), np.int64)
    first, auc, size = auc_within_groups(nothing, requests, predictions[order], labels)
    return requests[first], auc, size
