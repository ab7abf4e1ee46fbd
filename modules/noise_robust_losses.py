"""Losses that believe a surprising label less than the cross-entropy does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from mlenv.errors import ConfigError, check_above
from mlenv.modules.losses import weighted_binary_cross_entropy, weighted_mean


@dataclass(frozen=True, kw_only=True)
class GeneralizedCrossEntropyConfig:
    q: float = 0.7
    """From the cross-entropy (towards 0) to the mean absolute error (1), which no label can dominate."""

    reads_requests: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.q <= 1:
            raise ConfigError("q", expected="a number in (0, 1]", received=self.q)

    def build(self) -> GeneralizedCrossEntropy:
        return GeneralizedCrossEntropy(self)


class GeneralizedCrossEntropy(nn.Module):
    """``y (1 - p^q) / q + (1 - y) (1 - (1 - p)^q) / q``. It exaggerates: its predictions need a calibrator.

    Source: Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
    NeurIPS 2018, arXiv:1805.07836, here with two classes.
    """

    def __init__(self, config: GeneralizedCrossEntropyConfig) -> None:
        super().__init__()
        self.q = config.q

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor, requests: Tensor | None = None) -> Tensor:
        """Shapes are those of ``LossConfig``."""
        if_positive, if_negative = (-(self.q * functional.logsigmoid(side)).expm1() / self.q for side in (logits, -logits))
        return weighted_mean(labels * if_positive + (1 - labels) * if_negative, weights)


@dataclass(frozen=True, kw_only=True)
class SymmetricCrossEntropyConfig:
    alpha: float = 0.1
    """Weight of the cross-entropy."""
    beta: float = 1.0
    """Weight of the reverse cross-entropy, in which labels and predictions change places."""
    log_zero: float = -4.0
    """What stands for the logarithm of a label 0, and the least that the logarithm of any label may be."""

    reads_requests: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_above("alpha", self.alpha, 0)
        check_above("beta", self.beta, 0)
        if not (math.isfinite(self.log_zero) and self.log_zero < 0):
            raise ConfigError("log_zero", expected="a number < 0", received=self.log_zero)

    def build(self) -> SymmetricCrossEntropy:
        return SymmetricCrossEntropy(self)


class SymmetricCrossEntropy(nn.Module):
    """``alpha (-y log p - (1 - y) log(1 - p)) + beta (-p log y - (1 - p) log(1 - y))``. Its predictions need a calibrator.

    Source: Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019, arXiv:1908.06112, here
    with two classes.
    """

    def __init__(self, config: SymmetricCrossEntropyConfig) -> None:
        super().__init__()
        self.alpha, self.beta, self.log_zero = config.alpha, config.beta, config.log_zero

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor, requests: Tensor | None = None) -> Tensor:
        """Shapes are those of ``LossConfig``."""
        log_label, log_other = (part.log().clamp(min=self.log_zero) for part in (labels, 1 - labels))
        reverse = weighted_mean(-logits.sigmoid() * log_label - (-logits).sigmoid() * log_other, weights)
        return self.alpha * weighted_binary_cross_entropy(logits, labels, weights) + self.beta * reverse
