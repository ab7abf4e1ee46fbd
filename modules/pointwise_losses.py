"""Losses that look at one example at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from mlenv.errors import ConfigError, check_at_least
from mlenv.modules.losses import weighted_binary_cross_entropy, weighted_mean


@dataclass(frozen=True, kw_only=True)
class BinaryCrossEntropyConfig:
    label_smoothing: float = 0.0
    """Moves a label y to ``(1 - label_smoothing) y + label_smoothing / 2``; predictions move with it."""

    reads_requests: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError("label_smoothing", expected="a number in [0, 1)", received=self.label_smoothing)

    def build(self) -> BinaryCrossEntropy:
        return BinaryCrossEntropy(self)


class BinaryCrossEntropy(nn.Module):
    """``-y log p - (1 - y) log(1 - p)`` with ``p = sigmoid(logit)``, its least value at ``p = y``: predictions are calibrated.

    Source: label smoothing is of Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016.
    """

    def __init__(self, config: BinaryCrossEntropyConfig) -> None:
        super().__init__()
        self.label_smoothing = config.label_smoothing

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor, requests: Tensor | None = None) -> Tensor:
        """Shapes are those of ``LossConfig``."""
        if self.label_smoothing:
            labels = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        return weighted_binary_cross_entropy(logits, labels, weights)


@dataclass(frozen=True, kw_only=True)
class FocalLossConfig:
    gamma: float = 2.0
    """How strongly examples that are already right lose weight; 0 is the cross-entropy."""
    alpha: float | None = None
    """Weight of positives, that of negatives being ``1 - alpha``; null weighs both with 1."""

    reads_requests: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_at_least("gamma", self.gamma, 0)
        if self.alpha is not None and not 0 < self.alpha < 1:
            raise ConfigError("alpha", expected="a number in (0, 1), or null", received=self.alpha)

    def build(self) -> FocalLoss:
        return FocalLoss(self)


class FocalLoss(nn.Module):
    """Cross-entropy with less weight on what the model already gets right. Its predictions need a calibrator.

    ``-alpha y (1 - p)^gamma log p - (1 - alpha) (1 - y) p^gamma log(1 - p)``, averaged over examples as every other loss
    is, where the paper divides by the number of positives.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002.
    """

    def __init__(self, config: FocalLossConfig) -> None:
        super().__init__()
        self.gamma = config.gamma
        self.of_positives, self.of_negatives = (1.0, 1.0) if config.alpha is None else (config.alpha, 1 - config.alpha)

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor, requests: Tensor | None = None) -> Tensor:
        """Shapes are those of ``LossConfig``."""
        # Powers of probabilities through their logarithms: a power of zero has no gradient for gamma < 1.
        log_positive, log_negative = functional.logsigmoid(logits), functional.logsigmoid(-logits)
        if_positive = -self.of_positives * (self.gamma * log_negative).exp() * log_positive
        if_negative = -self.of_negatives * (self.gamma * log_positive).exp() * log_negative
        return weighted_mean(labels * if_positive + (1 - labels) * if_negative, weights)
