"""Explicit feature crossing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mlenv.errors import check_at_least


@dataclass(frozen=True, kw_only=True)
class CrossNetConfig:
    num_layers: int = 3
    """Number of crosses; layer k adds interactions of order k + 1."""

    def __post_init__(self) -> None:
        check_at_least("num_layers", self.num_layers, 1)

    def build(self, field_dims: Sequence[int]) -> CrossNet:
        return CrossNet(self, sum(field_dims))


class CrossNet(nn.Module):
    """Multiplies the input with itself, one order per layer.

    ``x[l+1] = x[0] * (W[l] x[l] + b[l]) + x[l]``

    Source: Wang et al., "DCN V2", WWW 2021, arXiv:2008.13535, section 3.2.
    """

    def __init__(self, config: CrossNetConfig, input_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(input_dim, input_dim) for _ in range(config.num_layers))
        self.output_dim = input_dim

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, input_dim)``, float32 or bfloat16.

        Returns:
            ``(batch, input_dim)``, same dtype.
        """
        crossed = inputs
        for layer in self.layers:
            crossed = inputs * layer(crossed) + crossed
        return crossed
