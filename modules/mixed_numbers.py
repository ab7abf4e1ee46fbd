"""Numbers in a form that is learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlenv.errors import check_at_least
from mlenv.modules.normalization import NumericNormalization, signed_log1p
from mlenv.schema import Numeric, Schema


@dataclass(frozen=True, kw_only=True)
class MixedNumbersConfig:
    clip: float = 10.0
    """Largest size of each form of a number, and of the elements of a vector. At least 1; a logarithm of 10 is a value of 22025."""

    def __post_init__(self) -> None:
        check_at_least("clip", self.clip, 1)

    def build(self, schema: Schema) -> MixedNumbers:
        return MixedNumbers(schema, self.clip)


class MixedNumbers(nn.Module):
    """Mixes three forms of each numeric feature, in shares that are learned per feature and start equal.

    ``w[0] clip(x) + w[1] clip(sign(x) log(1 + |x|)) + w[2] clip(z(x))`` with ``w = softmax(scores)``; ``z`` is what
    ``NumericNormalization`` gives, as it also does for flags and vectors.

    The logarithm as in: Qin et al., "Are Neural Rankers still Outperformed by Gradient Boosted Decision Trees?", ICLR 2021.
    """

    columns: Tensor

    def __init__(self, schema: Schema, clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        self.normalization = NumericNormalization(schema, clip)
        columns = [column.start for column in schema.dense_columns if isinstance(schema.features[column.name], Numeric)]
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.long), persistent=False)
        self.scores = nn.Parameter(torch.zeros(3, len(columns)))

    def forward(self, dense: Tensor) -> Tensor:
        """
        Args:
            dense: ``(batch, num_dense)`` float32, raw values; NaN is the null of a feature without a default.

        Returns:
            ``(batch, num_dense)`` float32 inside ``[-clip, clip]``; a null is what the mean of the feature gives.
        """
        normalized: Tensor = self.normalization(dense)
        raw = dense.index_select(1, self.columns)
        if self.normalization.has_nulls:
            raw = torch.where(raw.isnan(), self.normalization.raw_mean().index_select(0, self.columns), raw)
        standardized = normalized.index_select(1, self.columns)
        forms = torch.stack([raw.clamp(-self.clip, self.clip), signed_log1p(raw).clamp(-self.clip, self.clip), standardized], dim=1)
        return normalized.index_copy(1, self.columns, (forms * self.scores.softmax(0)).sum(1))
