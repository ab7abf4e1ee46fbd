"""What a loss is, and the table to choose one from; the plain one as a function."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor, nn
from torch.nn import functional


class LossConfig(Protocol):
    """Builds a module ``(logits, labels, weights, requests) -> (tasks,)``, the mean loss of each task over what counts.

    ``logits``, ``labels`` in [0, 1] and ``weights`` >= 0 are ``(batch, tasks)`` float32; ``requests`` is ``(batch,)`` int64
    as in ``Batch``, or None where ``reads_requests`` is False. A weight of 0 hides an example from a task; a row of weight 2
    counts as two rows. A task for which nothing counts has the loss 0 and no gradient.
    """

    reads_requests: ClassVar[bool]

    def build(self) -> nn.Module: ...


LOSSES: dict[str, type | str] = {
    "binary_cross_entropy": "mlenv.modules.pointwise_losses:BinaryCrossEntropyConfig",
    "fake_negative_weighted": "mlenv.modules.delayed_feedback:FakeNegativeWeightedConfig",
    "focal": "mlenv.modules.pointwise_losses:FocalLossConfig",
    "generalized_cross_entropy": "mlenv.modules.noise_robust_losses:GeneralizedCrossEntropyConfig",
    "listwise": "mlenv.modules.request_losses:ListwiseLossConfig",
    "pairwise": "mlenv.modules.request_losses:PairwiseLossConfig",
    "symmetric_cross_entropy": "mlenv.modules.noise_robust_losses:SymmetricCrossEntropyConfig",
}
"""Losses by kind. Import paths, because all of them use the functions below."""


def weighted_binary_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the binary cross-entropy of each task.

    Args:
        logits: ``(batch, tasks)`` float32.
        labels: ``(batch, tasks)`` float32 in [0, 1].
        weights: ``(batch, tasks)`` float32, >= 0; 0 hides the example from the task.

    Returns:
        ``(tasks,)`` float32; 0 for a task that no example of the batch counts for.
    """
    return weighted_mean(functional.binary_cross_entropy_with_logits(logits, labels, reduction="none"), weights)


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Mean over the rows of ``(rows, tasks)``; 0 for a task whose weights are all 0."""
    total = weights.sum(0)
    return (losses * weights).sum(0) / total.masked_fill(total == 0, 1)
