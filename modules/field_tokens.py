"""From one flat vector to one token per field."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn


class FieldTokens(nn.Module):
    """Cuts a representation into its fields and brings them to one width.

    A field of that width is a token as it is; any other has a linear map of its own, and neighbours of equal width are mapped
    together.
    """

    def __init__(self, field_dims: Sequence[int], token_dim: int) -> None:
        super().__init__()
        self.num_fields, self.token_dim = len(field_dims), token_dim
        self.runs = [(dim, len(list(run))) for dim, run in groupby(field_dims)]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for dim, count in ((dim, count) for dim, count in self.runs if dim != token_dim):
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
        tokens = self.runs_of(inputs)
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)

    def runs_of(self, inputs: Tensor) -> list[Tensor]:
        """The same tokens, ``(batch, fields of a run, token_dim)`` for each run of neighbours of equal width: none is copied."""
        pieces = torch.split(inputs, [dim * count for dim, count in self.runs], dim=1)
        tokens, maps = [], iter(zip(self.weights, self.biases, strict=True))
        for (dim, count), piece in zip(self.runs, pieces, strict=True):
            fields = piece.view(-1, count, dim)
            tokens.append(fields if dim == self.token_dim else _mapped(fields, *next(maps)))
        return tokens


def _mapped(fields: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``(batch, fields, dim)`` to ``(batch, fields, token_dim)``."""
    count, dim = fields.shape[1:]
    if dim == 1:  # a number times a vector: as a product of matrices this takes several times as long on a CPU
        return torch.addcmul(bias.view(count, -1), fields, weight.view(count, -1))
    return torch.einsum("bfd,fdt->bft", fields, weight.view(count, dim, -1)) + bias.view(count, -1)
