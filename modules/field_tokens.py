"""From one flat vector to one token per field."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn


class FieldTokens(nn.Module):
    """Cuts a representation into its fields and brings them to one width.

    Where every field has that width already this is a view; otherwise each field has its own linear map, and neighbours
    of equal width are mapped together.
    """

    def __init__(self, field_dims: Sequence[int], token_dim: int) -> None:
        super().__init__()
        self.num_fields, self.token_dim = len(field_dims), token_dim
        self.runs = [(dim, len(list(run))) for dim, run in groupby(field_dims)]
        self.is_view = set(field_dims) == {token_dim}
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for dim, count in [] if self.is_view else self.runs:
            # The maps of a run as one matrix: the gradient of an axis of size 1 has strides that distributed training warns about.
            self.weights.append(nn.Parameter(torch.randn(count * dim, token_dim) * dim**-0.5))
            self.biases.append(nn.Parameter(torch.zeros(count * token_dim)))  # flat: decay is for matrices

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, sum of field_dims)``.

        Returns:
            ``(batch, fields, token_dim)``, same dtype.
        """
        if self.is_view:
            return inputs.view(-1, self.num_fields, self.token_dim)
        tokens = []
        pieces = torch.split(inputs, [dim * count for dim, count in self.runs], dim=1)
        for (dim, count), piece, weight, bias in zip(self.runs, pieces, self.weights, self.biases, strict=True):
            tokens.append(torch.einsum("bfd,fdt->bft", piece.view(-1, count, dim), weight.view(count, dim, -1)) + bias.view(count, -1))
        return torch.cat(tokens, dim=1)
