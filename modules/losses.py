"""Means of losses, and the plain loss. The table to choose a loss from is in ``mlenv.config``."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


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
