"""Numbers on one scale."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mlenv.schema import Numeric, Schema


class NumericNormalization(nn.Module):
    """Standardizes numeric features; binary features and vectors pass unchanged.

    ``clip((f(x) - mean) / std)`` with ``f`` the identity, or ``sign(x) log(1 + |x|)`` where the schema says log1p. Mean
    and standard deviation are buffers: they are fitted once on training rows and travel in the checkpoint.
    """

    mean: Tensor
    std: Tensor
    is_log1p: Tensor
    is_numeric: Tensor

    def __init__(self, schema: Schema, clip: float = 10.0) -> None:
        super().__init__()
        numeric = torch.zeros(schema.num_dense, dtype=torch.bool)
        log1p = torch.zeros(schema.num_dense, dtype=torch.bool)
        for column in schema.dense_columns:
            feature = schema.features[column.name]
            if isinstance(feature, Numeric):
                numeric[column.start], log1p[column.start] = True, feature.log1p
        self.clip, self.has_log1p = clip, bool(log1p.any())
        self.register_buffer("mean", torch.zeros(schema.num_dense))
        self.register_buffer("std", torch.ones(schema.num_dense))
        self.register_buffer("is_log1p", log1p, persistent=False)
        self.register_buffer("is_numeric", numeric, persistent=False)

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Sets mean and standard deviation from raw ``(rows, num_dense)`` batches; a constant feature keeps a std of 1."""
        count, total, squares = 0, torch.zeros_like(self.mean, dtype=torch.float64), torch.zeros_like(self.mean, dtype=torch.float64)
        for dense in batches:
            values = self._compress(dense.to(self.mean.device)).double()
            count, total, squares = count + len(values), total + values.sum(0), squares + values.square().sum(0)
        mean = total / max(count, 1)
        std = (squares / max(count, 1) - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(torch.where(self.is_numeric, mean, 0.0))
        self.std.copy_(torch.where(self.is_numeric & (std > 1e-6), std, 1.0))

    def forward(self, dense: Tensor) -> Tensor:
        """
        Args:
            dense: ``(batch, num_dense)`` float32, raw values without NaN.

        Returns:
            ``(batch, num_dense)`` float32; numeric columns inside ``[-clip, clip]``.
        """
        normalized = (self._compress(dense) - self.mean) / self.std
        return torch.where(self.is_numeric, normalized.clamp(-self.clip, self.clip), normalized)

    def _compress(self, dense: Tensor) -> Tensor:
        if not self.has_log1p:
            return dense
        return torch.where(self.is_log1p, dense.sign() * dense.abs().log1p(), dense)
