"""Numbers on one scale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlenv.errors import check_at_least
from mlenv.schema import Numeric, Schema


@dataclass(frozen=True, kw_only=True)
class NumericNormalizationConfig:
    clip: float = 10.0
    """Largest size of what comes out: deviations of a number, elements of a vector. At least 1, which leaves flags whole."""

    def __post_init__(self) -> None:
        check_at_least("clip", self.clip, 1)

    def build(self, schema: Schema) -> NumericNormalization:
        return NumericNormalization(schema, self.clip)


class NumericNormalization(nn.Module):
    """Standardizes numeric features; flags and the elements of vectors are cut, but not scaled.

    ``clip((f(x) - mean) / std)`` with ``f`` the identity, or ``sign(x) log(1 + |x|)`` where the schema says log1p. Mean
    and standard deviation are buffers: they are fitted once on training rows and travel in the checkpoint. One row of
    1e30 among them makes all others equal: give such a column log1p.
    """

    mean: Tensor
    std: Tensor
    is_log1p: Tensor
    is_numeric: Tensor

    def __init__(self, schema: Schema, clip: float = 10.0) -> None:
        super().__init__()
        numeric = torch.zeros(schema.num_dense, dtype=torch.bool)
        log1p = torch.zeros(schema.num_dense, dtype=torch.bool)
        self.clip, self.has_nulls = clip, False
        for column in schema.dense_columns:
            feature = schema.features[column.name]
            if isinstance(feature, Numeric):
                numeric[column.start], log1p[column.start] = True, feature.log1p
                self.has_nulls |= feature.default is None
        self.has_log1p = bool(log1p.any())
        self.register_buffer("mean", torch.zeros(schema.num_dense))
        self.register_buffer("std", torch.ones(schema.num_dense))
        self.register_buffer("is_log1p", log1p, persistent=False)
        self.register_buffer("is_numeric", numeric, persistent=False)

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Sets mean and standard deviation from raw ``(rows, num_dense)`` batches.

        Nulls do not count; a feature that is constant, or always null, keeps a std of 1.
        """
        count, total, squares = (torch.zeros_like(self.mean, dtype=torch.float64) for _ in range(3))
        for dense in batches:
            values = self._compress(dense.to(self.mean.device)).double()
            count += values.isnan().logical_not().sum(0)
            total += values.nansum(0)
            squares += values.square().nansum(0)
        mean = total / count.clamp(min=1)
        std = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(torch.where(self.is_numeric, mean, 0.0))
        self.std.copy_(torch.where(self.is_numeric & (std > 1e-6), std, 1.0))

    def forward(self, dense: Tensor) -> Tensor:
        """
        Args:
            dense: ``(batch, num_dense)`` float32, raw values; NaN is the null of a feature without a default.

        Returns:
            ``(batch, num_dense)`` float32 inside ``[-clip, clip]``; a null is 0, the mean.
        """
        normalized = ((self._compress(dense) - self.mean) / self.std).clamp(-self.clip, self.clip)
        return normalized.nan_to_num() if self.has_nulls else normalized

    def raw_mean(self) -> Tensor:
        """``(num_dense,)``: the raw value that becomes 0 in each numeric column."""
        return torch.where(self.is_log1p, self.mean.sign() * self.mean.abs().expm1(), self.mean)

    def _compress(self, dense: Tensor) -> Tensor:
        if not self.has_log1p:
            return dense
        return torch.where(self.is_log1p, signed_log1p(dense), dense)


def signed_log1p(values: Tensor) -> Tensor:
    """``sign(x) log(1 + |x|)``, elementwise."""
    return values.sign() * values.abs().log1p()
