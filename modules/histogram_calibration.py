"""Histogram calibration: the mean label of a bin of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mlenv.errors import check_at_least
from mlenv.modules.calibration import Floats, Ints, examples_that_count, inside_unit_interval


class HistogramCalibrator(nn.Module):
    """``p = predictions[i]`` for a logit between ``edges[i - 1]`` (inclusive) and ``edges[i]``."""

    edges: Tensor
    predictions: Tensor

    def __init__(self, edges: Any, predictions: Any) -> None:
        super().__init__()
        self.register_buffer("edges", torch.as_tensor(edges, dtype=torch.float64))
        self.register_buffer("predictions", torch.as_tensor(predictions, dtype=torch.float64))

    def forward(self, logits: Tensor) -> Tensor:
        """
        Args:
            logits: ``(batch,)``, any float type.

        Returns:
            predictions ``(batch,)`` float32 in (0, 1).
        """
        return inside_unit_interval(self.predictions[torch.bucketize(logits.double(), self.edges, right=True)])


@dataclass(frozen=True, kw_only=True)
class HistogramConfig:
    """Mean label per bin of logits. Many examples get the same prediction, and a bin without positives nearly 0.

    Source: Zadrozny and Elkan, "Obtaining calibrated probability estimates from decision trees and naive Bayesian
    classifiers", ICML 2001.
    """

    num_bins: int = 20
    """Bins of about equal weight; equal logits share one."""

    calibrator: ClassVar[type[nn.Module]] = HistogramCalibrator
    needs_labels: ClassVar[bool] = True
    segments: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_at_least("num_bins", self.num_bins, 1)

    def fit(self, logits: Floats, labels: Floats, weights: Floats, segments: Ints | None = None) -> HistogramCalibrator:
        """
        Raises:
            DataError: one class only.
        """
        examples = examples_that_count(logits, labels, weights)
        values, value_of_row = np.unique(examples.logits, return_inverse=True)
        weight = np.bincount(value_of_row, examples.weights)
        positives = np.bincount(value_of_row, examples.weights * examples.labels)
        middle = np.cumsum(weight) - weight / 2
        # The nudge keeps a value that lies on a border in the same bin, whatever the order in which its sum was rounded.
        bins = np.floor(self.num_bins * middle / weight.sum() + 1e-9)
        starts = np.flatnonzero(np.diff(bins, prepend=-1))
        edges = (values[starts[1:] - 1] + values[starts[1:]]) / 2
        return HistogramCalibrator(edges, np.add.reduceat(positives, starts) / np.add.reduceat(weight, starts))
