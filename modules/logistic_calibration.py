"""Calibrators that are affine in the logit: temperature, Platt, logistic regression by segment, correction for sampled negatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mlenv.errors import ConfigError, DataError, check_above
from mlenv.modules.calibration import Examples, Floats, Ints, examples_that_count, inside_unit_interval

_MAX_STEPS = 100
_TOLERANCE = 1e-14
"""Of the Newton decrement, per unit of weight; the step that is still taken from there squares it."""


class AffineCalibrator(nn.Module):
    """``p = sigmoid(scale * logit + offset)``"""

    scale: Tensor
    offset: Tensor

    def __init__(self, scale: Any, offset: Any) -> None:
        super().__init__()
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64))
        self.register_buffer("offset", torch.as_tensor(offset, dtype=torch.float64))

    def forward(self, logits: Tensor) -> Tensor:
        """
        Args:
            logits: ``(batch,)``, any float type.

        Returns:
            predictions ``(batch,)`` float32 in (0, 1).
        """
        return inside_unit_interval(torch.sigmoid(self.scale * logits.double() + self.offset))


class SegmentCalibrator(nn.Module):
    """``p = sigmoid((scale + sum over c of scales[c, s_c]) * logit + offset + sum over c of offsets[c, s_c])``

    ``s_c`` is the code of the row's value in segment column c. Code 0 stands for null and for values that were not there
    when it was fitted; its terms are 0, so that such a row gets the global ones.
    """

    scale: Tensor
    offset: Tensor
    scales: Tensor
    offsets: Tensor
    columns: Tensor

    def __init__(self, scale: Any, offset: Any, scales: Any, offsets: Any) -> None:
        super().__init__()
        for name, values in (("scale", scale), ("offset", offset), ("scales", scales), ("offsets", offsets)):
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float64))
        self.register_buffer("columns", torch.arange(self.offsets.shape[0]), persistent=False)

    def forward(self, logits: Tensor, segments: Tensor) -> Tensor:
        """
        Args:
            logits: ``(batch,)``, any float type.
            segments: ``(batch, columns)`` int64, codes of the segment values.

        Returns:
            predictions ``(batch,)`` float32 in (0, 1).
        """
        scale = self.scale + self.scales[self.columns, segments].sum(1)
        offset = self.offset + self.offsets[self.columns, segments].sum(1)
        return inside_unit_interval(torch.sigmoid(scale * logits.double() + offset))


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig:
    """One scale for all logits: mends a model that is too sure or too unsure, not one that is wrong on average.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017, arXiv:1706.04599.
    """

    calibrator: ClassVar[type[nn.Module]] = AffineCalibrator
    needs_labels: ClassVar[bool] = True
    segments: ClassVar[tuple[str, ...]] = ()

    def fit(self, logits: Floats, labels: Floats, weights: Floats, segments: Ints | None = None) -> AffineCalibrator:
        """
        Raises:
            DataError: one class only, logits whose sign alone tells the labels, or logits that fall as labels rise.
        """
        examples = examples_that_count(logits, labels, weights)
        signed = np.where(examples.labels > 0.5, examples.logits, -examples.logits)
        if signed.min() >= 0:
            raise _separable("logits of either sign in at least one class")
        ((scale,),) = _fit([_global(examples.logits)], examples)
        if scale <= 0:
            fix = "see whether the label is the right one; platt takes such logits too"
            raise DataError("logits", expected="logits that rise with the labels", received=f"a best scale of {scale:.3g}", fix=fix)
        return AffineCalibrator(scale, 0.0)


@dataclass(frozen=True, kw_only=True)
class PlattConfig:
    """Logistic regression on the logit, without a penalty and with the labels as they are (no smoothed targets).

    Source: Platt, "Probabilistic outputs for support vector machines and comparisons to regularized likelihood methods", 1999.
    """

    calibrator: ClassVar[type[nn.Module]] = AffineCalibrator
    needs_labels: ClassVar[bool] = True
    segments: ClassVar[tuple[str, ...]] = ()

    def fit(self, logits: Floats, labels: Floats, weights: Floats, segments: Ints | None = None) -> AffineCalibrator:
        """
        Raises:
            DataError: one class only, or logits that do not overlap between the classes.
        """
        examples = examples_that_count(logits, labels, weights)
        _check_overlap(examples)
        (scale,), (offset,) = _fit([_global(examples.logits), _global(np.ones_like(examples.logits))], examples)
        return AffineCalibrator(scale, offset)


@dataclass(frozen=True, kw_only=True)
class LogisticConfig:
    """Logistic regression on the logit and the values of segment columns, so that each segment is right on average."""

    segments: tuple[str, ...]
    """Columns of ``schema.segments``. Null, and a value not seen in fitting, gets the global terms."""
    ridge: float = 1.0
    """Penalty on the squared terms of a segment value, in examples; the global terms are free."""
    segment_scales: bool = False
    """Also fit the slope of the logit by segment value."""

    calibrator: ClassVar[type[nn.Module]] = SegmentCalibrator
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_above("ridge", self.ridge, 0)
        if not self.segments or len(set(self.segments)) < len(self.segments):
            fix = "name columns of schema.segments; without any, use kind platt"
            raise ConfigError("segments", expected="one segment column or more, each once", received=list(self.segments), fix=fix)

    def fit(self, logits: Floats, labels: Floats, weights: Floats, segments: Ints | None = None) -> SegmentCalibrator:
        """
        Args:
            segments: ``(rows, columns)``, codes of the segment values; 0 for null and for values to be treated as unseen.

        Raises:
            DataError: one class only, or logits that do not overlap between the classes.
        """
        assert segments is not None, "a row has a code for each column of LogisticConfig.segments"
        sizes = segments.max(0, initial=0) + 1
        examples = examples_that_count(logits, labels, weights, segments)
        _check_overlap(examples)
        ones = np.ones_like(examples.logits)
        terms = [_global(examples.logits), _global(ones)]
        for factor in (ones, examples.logits) if self.segment_scales else (ones,):
            for codes, size in zip(examples.segments.T, sizes, strict=True):
                terms.append(_Terms(codes, int(size), factor * (codes > 0), self.ridge))
        (scale,), (offset,), *by_segment = _fit(terms, examples)
        tables = np.zeros((2, len(sizes), sizes.max()))
        for number, values in enumerate(by_segment):
            tables[number // len(sizes), number % len(sizes), 1 : len(values)] = values[1:]
        return SegmentCalibrator(scale, offset, scales=tables[1], offsets=tables[0])


@dataclass(frozen=True, kw_only=True)
class NegativeSamplingConfig:
    """Corrects a model that was trained on all positives and a share of the negatives; nothing is fitted.

    ``p = q / (q + (1 - q) / rate)``, which is ``logit p = logit q + log(rate)``.

    Source: He et al., "Practical lessons from predicting clicks on ads at Facebook", ADKDD 2014.
    """

    rate: float
    """Share of the negatives that the training rows kept, in (0, 1]."""

    calibrator: ClassVar[type[nn.Module]] = AffineCalibrator
    needs_labels: ClassVar[bool] = False
    segments: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ConfigError("rate", expected="a number in (0, 1]", received=self.rate)

    def fit(self, logits: Floats, labels: Floats, weights: Floats, segments: Ints | None = None) -> AffineCalibrator:
        """Looks at nothing."""
        return AffineCalibrator(1.0, math.log(self.rate))


@dataclass(frozen=True)
class _Terms:
    """Coefficients of which each row takes one, by its code, times a factor of the row."""

    codes: Ints
    size: int
    factor: Floats
    ridge: float


def _global(factor: Floats) -> _Terms:
    return _Terms(np.zeros(len(factor), np.int64), 1, factor, 0.0)


def _fit(terms: Sequence[_Terms], examples: Examples) -> list[Floats]:
    """Coefficients of a logistic regression, by Newton steps that are halved until the loss falls.

    The matrix of the regression is never made: a row has one entry per element of ``terms``, and sums over rows are
    counts by code.
    """
    labels, weights = examples.labels, examples.weights
    ends = np.cumsum([term.size for term in terms])
    ridge = np.concatenate([np.full(term.size, term.ridge) for term in terms])

    def logits_at(coefficients: Floats) -> Floats:
        parts = np.split(coefficients, ends[:-1])
        logits: Floats = np.sum([part[term.codes] * term.factor for part, term in zip(parts, terms, strict=True)], axis=0)
        return logits

    def loss_at(coefficients: Floats) -> float:
        logits = logits_at(coefficients)
        return float(weights @ (np.logaddexp(0, logits) - labels * logits) + ridge @ coefficients**2 / 2)

    coefficients = np.zeros(ends[-1])  # where no prediction is saturated, so that the first steps are safe
    for _ in range(_MAX_STEPS):
        predictions = np.exp(-np.logaddexp(0, -logits_at(coefficients)))
        residuals, curvature = weights * (predictions - labels), weights * predictions * (1 - predictions)
        gradient = np.concatenate([_sums(term.codes, residuals * term.factor, term.size) for term in terms]) + ridge * coefficients
        hessian = np.block([[_joint_sums(row, column, curvature) for column in terms] for row in terms]) + np.diag(ridge)
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        if gradient @ step <= _TOLERANCE * weights.sum():
            return np.split(coefficients - step, ends[:-1])
        loss = loss_at(coefficients)
        while loss_at(coefficients - step) > loss:
            step /= 2
        coefficients -= step
    raise _separable(f"a fit that ends within {_MAX_STEPS} steps")


def _joint_sums(row: _Terms, column: _Terms, curvature: Floats) -> Floats:
    """``(row.size, column.size)``: one block of the matrix of second derivatives."""
    cells = row.codes * column.size + column.codes
    return _sums(cells, curvature * row.factor * column.factor, row.size * column.size).reshape(row.size, column.size)


def _sums(codes: Ints, values: Floats, size: int) -> Floats:
    sums: Floats = np.bincount(codes, values, size).astype(np.float64)
    return sums


def _check_overlap(examples: Examples) -> None:
    """Where a threshold tells the classes apart, and where all logits are equal, no best slope exists."""
    positives, negatives = (examples.logits[mask] for mask in (examples.labels > 0.5, examples.labels <= 0.5))
    if positives.min() >= negatives.max() or positives.max() <= negatives.min():
        raise _separable("logits that overlap between the classes and are not all equal")


def _separable(expected: str) -> DataError:
    fix = "hold out more days in data.validation, or use kind isotonic, which has no slope"
    return DataError("logits", expected=expected, received="none", fix=fix)
