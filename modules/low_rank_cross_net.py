"""Explicit feature crossing with few parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlenv.errors import check_at_least


@dataclass(frozen=True, kw_only=True)
class LowRankCrossNetConfig:
    num_layers: int = 3
    """Number of crosses; layer k adds interactions of order k + 1."""
    num_experts: int = 4
    """Small subspaces that a layer crosses in."""
    rank: int = 32
    """Width of a subspace."""

    def __post_init__(self) -> None:
        check_at_least("num_layers", self.num_layers, 1)
        check_at_least("num_experts", self.num_experts, 1)
        check_at_least("rank", self.rank, 1)

    def build(self, field_dims: Sequence[int]) -> LowRankCrossNet:
        return LowRankCrossNet(self, sum(field_dims))


class LowRankCrossNet(nn.Module):
    """Multiplies the input with itself, one order per layer, in a mixture of small subspaces.

    ``x[l+1] = sum over experts i of G_i(x[l]) * x[0] * (U_i tanh(C_i tanh(V_i x[l])) + b)  +  x[l]`` with the weights, a
    matrix each of ``U, C, V``, and ``b`` of the layer, and ``G`` a softmax over a linear map of ``x[l]``.

    Source: Wang et al., "DCN V2", WWW 2021, arXiv:2008.13535, section 3.3 (mixture of low-rank experts).
    """

    def __init__(self, config: LowRankCrossNetConfig, input_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_LowRankCross(config, input_dim) for _ in range(config.num_layers))
        self.output_dim = input_dim

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, input_dim)``, float32 or bfloat16.

        Returns:
            ``(batch, input_dim)``.
        """
        crossed = inputs
        for layer in self.layers:
            crossed = inputs * layer(crossed) + crossed
        return crossed


class _LowRankCross(nn.Module):
    """All experts of a layer at once.

    The gates sum to 1, so that ``b`` stands outside the sum, and the experts' ``U`` side by side are one matrix.
    """

    def __init__(self, config: LowRankCrossNetConfig, input_dim: int) -> None:
        super().__init__()
        self.num_experts, self.rank = config.num_experts, config.rank
        self.gate = nn.Linear(input_dim, config.num_experts)
        self.reduce = nn.Linear(input_dim, config.num_experts * config.rank, bias=False)
        self.inner = nn.Parameter(torch.randn(config.num_experts, config.rank, config.rank) * config.rank**-0.5)
        self.expand = nn.Linear(config.num_experts * config.rank, input_dim)

    def forward(self, crossed: Tensor) -> Tensor:
        reduced = torch.unflatten(self.reduce(crossed).tanh(), 1, (self.num_experts, self.rank))
        inner = torch.einsum("ber,esr->bes", reduced, self.inner).tanh()
        gates = self.gate(crossed).softmax(dim=1).unsqueeze(2)
        outputs: Tensor = self.expand((gates * inner).flatten(1))
        return outputs
