"""Explicit feature crossing that can leave crosses out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mlenv.errors import check_at_least


@dataclass(frozen=True, kw_only=True)
class GatedCrossNetConfig:
    num_layers: int = 3
    """Number of crosses; layer k adds interactions of order k + 1."""

    def __post_init__(self) -> None:
        check_at_least("num_layers", self.num_layers, 1)

    def build(self, field_dims: Sequence[int]) -> GatedCrossNet:
        return GatedCrossNet(self, sum(field_dims))


class GatedCrossNet(nn.Module):
    """Multiplies the input with itself, one order per layer, and lets a gate weigh what each layer adds.

    ``x[l+1] = x[0] * (W_c[l] x[l] + b[l]) * sigmoid(W_g[l] x[l]) + x[l]``

    Source: Wang et al., "Towards Deeper, Lighter and Interpretable Cross Network for CTR Prediction", CIKM 2023,
    arXiv:2311.04635, section 3 (gated cross network).
    """

    def __init__(self, config: GatedCrossNetConfig, input_dim: int) -> None:
        super().__init__()
        self.crosses = nn.ModuleList(nn.Linear(input_dim, input_dim) for _ in range(config.num_layers))
        self.gates = nn.ModuleList(nn.Linear(input_dim, input_dim, bias=False) for _ in range(config.num_layers))
        self.output_dim = input_dim

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, input_dim)``, float32 or bfloat16.

        Returns:
            ``(batch, input_dim)``.
        """
        crossed = inputs
        for cross, gate in zip(self.crosses, self.gates, strict=True):
            crossed = inputs * cross(crossed) * gate(crossed).sigmoid() + crossed
        return crossed
