"""Learning from conversions before all of them have come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from mlenv.modules.losses import weighted_mean


@dataclass(frozen=True, kw_only=True)
class FakeNegativeWeightedConfig:
    reads_requests: ClassVar[bool] = False

    def build(self) -> FakeNegativeWeightedLoss:
        return FakeNegativeWeightedLoss()


class FakeNegativeWeightedLoss(nn.Module):
    """Cross-entropy on a stream in which every click is a negative at once and a positive again when it converts.

    A share ``p`` of the clicks converts, so that of ``1 + p`` rows ``p`` are positive: the plain cross-entropy would
    learn ``p / (1 + p)``. Each row counts by how much rarer or more frequent its label is in the stream than in truth,
    ``1 + p`` for a positive and ``(1 - p) (1 + p)`` for a negative, with the model's own prediction for ``p``, through
    which no gradient flows:

    ``-y (1 + p) log p - (1 - y) (1 - p) (1 + p) log(1 - p)``

    Its expected gradient is 0 at the true conversion rate. On rows whose label is final, each there once, use the plain
    cross-entropy: there this one would learn the odds.

    Source: Ktena et al., "Addressing Delayed Feedback for Continuous Training with Neural Networks in CTR prediction",
    RecSys 2019, arXiv:1907.06558, the fake negative weighted loss.
    """

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor, requests: Tensor | None = None) -> Tensor:
        """Shapes are those of ``LossConfig``."""
        constant = logits.detach()
        above = 1 + constant.sigmoid()
        if_positive = above * functional.softplus(-logits)
        if_negative = (-constant).sigmoid() * above * functional.softplus(logits)
        return weighted_mean(labels * if_positive + (1 - labels) * if_negative, weights)
