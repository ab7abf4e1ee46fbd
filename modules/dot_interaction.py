"""The similarity of every two fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlenv.errors import check_at_least
from mlenv.modules.crossings import check_several_fields
from mlenv.modules.field_tokens import FieldTokens


@dataclass(frozen=True, kw_only=True)
class DotInteractionConfig:
    token_dim: int = 16
    """Width that every field is brought to."""

    def __post_init__(self) -> None:
        check_at_least("token_dim", self.token_dim, 1)

    def build(self, field_dims: Sequence[int]) -> DotInteraction:
        check_several_fields("dot", field_dims)
        return DotInteraction(self, field_dims)


class DotInteraction(nn.Module):
    """The dot products ``<v[i], v[j]>`` of all pairs ``i < j`` of fields, side by side.

    Source: Naumov et al., "Deep Learning Recommendation Model", arXiv:1906.00091, section 2.2. The paper makes one vector
    of all numbers by a network and puts it beside the products; here every number is a field of its own, and the ranker's
    deep network stands beside the products.
    """

    pairs: Tensor

    def __init__(self, config: DotInteractionConfig, field_dims: Sequence[int]) -> None:
        super().__init__()
        self.tokens = FieldTokens(field_dims, config.token_dim)
        num_fields = len(field_dims)
        rows, columns = torch.triu_indices(num_fields, num_fields, offset=1)
        self.register_buffer("pairs", rows * num_fields + columns, persistent=False)
        self.output_dim = len(self.pairs)

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, sum of field_dims)``, float32 or bfloat16.

        Returns:
            ``(batch, fields * (fields - 1) / 2)``, ordered by the first field, then by the second.
        """
        tokens = self.tokens(inputs)
        products = torch.bmm(tokens, tokens.transpose(1, 2)).flatten(1)
        return products.index_select(1, self.pairs)
