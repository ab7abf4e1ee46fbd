"""Isotonic calibration: the non-decreasing function of the logit that fits the labels best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

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

    calibrator: ClassVar[type[nn.Module]] = IsotonicCalibrator
    needs_labels: ClassVar[bool] = True
    segments: ClassVar[tuple[str, ...]] = ()

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
        return IsotonicCalibrator(thresholds, predictions)


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
