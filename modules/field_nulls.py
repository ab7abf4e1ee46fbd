"""What stands in for a feature that is not there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FieldNulls(nn.Module):
    """Puts a learned vector, zeros at the start, in the place of every field that is null."""

    field_of_column: Tensor

    def __init__(self, field_dims: Sequence[int]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(sum(field_dims)))
        fields = torch.repeat_interleave(torch.arange(len(field_dims)), torch.tensor(field_dims, dtype=torch.long))
        self.register_buffer("field_of_column", fields, persistent=False)

    def forward(self, fields: Tensor, is_null: Tensor) -> Tensor:
        """
        Args:
            fields: ``(batch, sum of field_dims)``; what a null field holds does not matter.
            is_null: ``(batch, fields)`` bool.

        Returns:
            ``(batch, sum of field_dims)``.
        """
        return torch.where(is_null.index_select(1, self.field_of_column), self.values, fields)
