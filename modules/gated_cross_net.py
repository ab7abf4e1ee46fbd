"""Explicit feature crossing that can leave crosses out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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
        # W_c over W_g: one large product is faster than two.
        self.layers = nn.ModuleList(nn.Linear(input_dim, 2 * input_dim, bias=False) for _ in range(config.num_layers))
        self.biases = nn.Parameter(torch.zeros(config.num_layers, input_dim))
        self.output_dim = input_dim

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, input_dim)``, float32 or bfloat16.

        Returns:
            ``(batch, input_dim)``.
        """
        crossed = inputs
        for layer, bias in zip(self.layers, self.biases, strict=True):
            cross, gate = layer(crossed).chunk(2, dim=1)
            crossed = inputs * (cross + bias) * gate.sigmoid() + crossed
        return crossed
