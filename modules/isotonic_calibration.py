"""Isotonic calibration: the non-decreasing function of the logit that fits the labels best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mlenv.errors import check_above
from mlenv.modules.calibration import Floats, Ints, examples_that_count, inside_unit_interval


class IsotonicCalibrator(nn.Module):
    """Interpolates linearly between thresholds, and is constant beyond the first and the last."""

    thresholds: Tensor
    predictions: Tensor

    def __init__(self, thresholds: Any, predictions: Any) -> None:
        super().__init__()
        self.register_buffer("thresholds", torch.as_tensor(thresholds, dtype=torch.float64))
        self.register_buffer("predictions", torch.as_tensor(predictions, dtype=torch.float64))

    def forward(self, logits: Tensor) -> Tensor:
        """
        Args:
            logits: ``(batch,)``, any float type.

        Returns:
            predictions ``(batch,)`` float32 in (0, 1).
        """
        above = torch.bucketize(logits.double(), self.thresholds).clamp(1, self.thresholds.shape[0] - 1)
        left, right = self.thresholds[above - 1], self.thresholds[above]
        share = ((logits.double() - left) / (right - left)).clamp(0, 1)
        return inside_unit_interval(torch.lerp(self.predictions[above - 1], self.predictions[above], share))


@dataclass(frozen=True, kw_only=True)
class IsotonicConfig:
    """Any non-decreasing curve; wants more held-out rows than a curve with two parameters.

    Source: Zadrozny and Elkan, "Transforming classifier scores into accurate multiclass probability estimates", KDD 2002.
    """

    max_slope: float | None = 1.0
    """Most that a prediction may rise by per unit of the logit, or per deviation of the logits where that is smaller; a sigmoid rises by
    0.25 at most. The best curve of the held-out rows jumps wherever two logits lie close together: another order of summation, as on
    another machine, then moves a prediction far. null for that curve as it is, which an export may refuse."""

    calibrator: ClassVar[type[nn.Module]] = IsotonicCalibrator
    needs_labels: ClassVar[bool] = True
    segments: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.max_slope is not None:
            check_above("max_slope", self.max_slope, 0)

    def fit(self, logits: Floats, labels: Floats, weights: Floats, segments: Ints | None = None) -> IsotonicCalibrator:
        """
        Raises:
            DataError: one class only.
        """
        examples = examples_that_count(logits, labels, weights)
        values, value_of_row = np.unique(examples.logits, return_inverse=True)
        weight, positives = (
            np.bincount(value_of_row, counts).astype(np.float64) for counts in (examples.weights, examples.weights * examples.labels)
        )
        means, ends = pool_adjacent_violators(positives / weight, weight)
        # Inside a block the curve is flat: its first and its last value say all.
        starts = np.concatenate([[0], ends[:-1]])
        thresholds = values[np.stack([starts, ends - 1], axis=1)].ravel()
        kept = np.diff(thresholds, prepend=-np.inf) > 0
        thresholds, predictions = thresholds[kept], np.repeat(means, 2)[kept]
        if len(thresholds) == 1:  # all logits are equal: two thresholds, so that there is something to interpolate between
            thresholds, predictions = np.append(thresholds, thresholds + 1), np.repeat(predictions, 2)
        elif self.max_slope is not None:
            thresholds, predictions = less_steep(thresholds, predictions, self.max_slope / min(1.0, float(examples.logits.std())))
        return IsotonicCalibrator(thresholds, predictions)


def less_steep(thresholds: Floats, predictions: Floats, max_slope: float) -> tuple[Floats, Floats]:
    """A non-decreasing curve near another that nowhere rises faster than it may: the mean of the highest such curve below the other
    and the lowest one above it, so that a jump becomes a ramp with as much before it as behind.

    Args:
        thresholds, predictions: corners of a curve that is constant beyond both ends.
        max_slope: of what comes back, above 0.

    Returns:
        The same of the new curve.
    """
    below = _highest_below(thresholds, predictions, max_slope)
    turned = _highest_below(-thresholds[::-1], -predictions[::-1], max_slope)  # what is above is below when turned by half
    above = -turned[0][::-1], -turned[1][::-1]
    corners = np.unique(np.concatenate([below[0], above[0]]))
    return corners, (np.interp(corners, *below) + np.interp(corners, *above)) / 2


def _highest_below(thresholds: Floats, predictions: Floats, max_slope: float) -> tuple[Floats, Floats]:
    """From left to right it follows the other curve, falls behind where that is too steep, and rises as fast as it may until it has
    caught up."""
    corners, values = [float(thresholds[0])], [float(predictions[0])]
    behind = 0.0
    for left, right, low, high in zip(
        *(part.tolist() for part in (thresholds, thresholds[1:], predictions, predictions[1:])), strict=False
    ):
        slope = (high - low) / (right - left)
        if behind > 0 and (caught_up := left + behind / (max_slope - slope) if slope < max_slope else right) < right:
            corners.append(caught_up)
            values.append(low + slope * (caught_up - left))
            behind = 0.0
        if behind > 0 or slope > max_slope:
            behind = max(0.0, behind + (slope - max_slope) * (right - left))
        corners.append(right)
        values.append(high - behind)
    last = float(thresholds[-1]) + behind / max_slope
    return np.array([*corners, last]), np.array([*values, float(predictions[-1])])


def pool_adjacent_violators(values: Floats, weights: Floats) -> tuple[Floats, Ints]:
    """The non-decreasing sequence with the least weighted squared distance to ``values``, as blocks of equal values.

    Returns:
        The value of each block, and where each ends: the index of the first value after it.
    """
    block_means: list[float] = []
    block_weights: list[float] = []
    block_ends: list[int] = []
    for end, (mean, weight) in enumerate(zip(values.tolist(), weights.tolist(), strict=True), start=1):
        while block_means and block_means[-1] >= mean:
            before, lower = block_weights.pop(), block_means.pop()
            mean = (lower * before + mean * weight) / (before + weight)
            weight += before
            block_ends.pop()
        block_means.append(mean)
        block_weights.append(weight)
        block_ends.append(end)
    return np.array(block_means), np.array(block_ends)
