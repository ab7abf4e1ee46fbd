"""What all calibrators share: the examples that they may be fitted on, and the range of what they give."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mlenv.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SMALLEST_PREDICTION = 1e-7
"""Calibrated predictions keep this distance from 0 and 1: no held-out day is long enough to be surer."""


class Examples(NamedTuple):
    """What counts of the held-out rows of one task."""

    logits: Floats
    labels: Floats
    weights: Floats
    """All above 0."""
    segments: Ints
    """``(rows, columns)``, codes of the segment values."""


def examples_that_count(logits: Floats, labels: Floats, weights: Floats, segments: Ints | None = None) -> Examples:
    """Leaves out the rows whose weight is 0.

    Raises:
        DataError: a logit is not finite, or one of the two classes is missing.
    """
    counted = weights > 0
    codes = np.zeros((len(counted), 0), np.int64) if segments is None else segments
    examples = Examples(logits[counted], labels[counted], weights[counted], codes[counted])
    if not np.isfinite(examples.logits).all():
        raise DataError("logits", expected="finite numbers", received="nan or inf", fix="lower the learning rates: the training diverged")
    positives = float(examples.labels.sum())
    if not 0 < positives < len(examples.labels):
        received = f"{len(examples.labels)} examples, {positives:g} of them positive"
        fix = "hold out more days in data.validation, or take the task out of calibration"
        raise DataError("labels", expected="examples of both classes", received=received, fix=fix)
    return examples


def inside_unit_interval(predictions: Tensor) -> Tensor:
    """Predictions as float32, kept off 0 and 1."""
    return predictions.clamp(SMALLEST_PREDICTION, 1 - SMALLEST_PREDICTION).float()
