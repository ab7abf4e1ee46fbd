"""Batch normalization that no last batch of a few rows stops."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class BatchNorm(nn.BatchNorm1d):
    """Normalizes a training batch of one row, or of none, as an evaluation does: such a batch has no spread to learn from.

    Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167. It is torch's own, which refuses one row.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, features)``.

        Returns:
            the same shape.
        """
        if self.training and len(inputs) < 2:
            return functional.batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(inputs)
