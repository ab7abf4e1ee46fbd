"""Two plain networks that look at the features differently, and products of what they find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mlenv.errors import ConfigError, check_at_least
from mlenv.modules.mlp import MLPConfig


@dataclass(frozen=True, kw_only=True)
class FinalMLPConfig:
    gate: MLPConfig = field(default_factory=lambda: MLPConfig(hidden=(64,)))
    """Hidden layers of the network that weighs the features for a stream; each stream has its own."""
    first: MLPConfig = field(default_factory=lambda: MLPConfig(hidden=(256, 128)))
    """Layers of the first stream."""
    second: MLPConfig = field(default_factory=lambda: MLPConfig(hidden=(128,)))
    """Layers of the second stream."""
    num_heads: int = 2
    """Parts that each stream's output is cut into, to multiply part by part; divides the last width of both."""
    fused_dim: int = 1
    """Width of the output: 1, as in the paper, is a logit; more tasks have use for more."""

    def __post_init__(self) -> None:
        check_at_least("num_heads", self.num_heads, 1)
        check_at_least("fused_dim", self.fused_dim, 1)
        for name, stream in (("first", self.first), ("second", self.second)):
            if not stream.hidden:
                raise ConfigError(f"{name}.hidden", expected="one layer or more", received=stream.hidden)
            if stream.hidden[-1] % self.num_heads:
                expected = f"a divisor of the last width of {name}.hidden = {stream.hidden[-1]}"
                raise ConfigError("num_heads", expected=expected, received=self.num_heads, fix=f"change it or {name}.hidden")

    def build(self, field_dims: Sequence[int]) -> FinalMLP:
        return FinalMLP(self, sum(field_dims))


class FinalMLP(nn.Module):
    """Fuses two streams of layers, each over its own weighting of the features.

    Stream ``s`` reads ``2 sigmoid(gate_s(x)) * x`` and gives ``o_s``. Their fusion is
    ``b + W_1 o_1 + W_2 o_2 + sum over heads h of o_1[h]^T W_h o_2[h]``, where ``o[h]`` is part ``h`` of a stream's output.

    Source: Mao et al., "FinalMLP", AAAI 2023, arXiv:2304.00902, section "Our model". The paper's gates read chosen
    features, such as those of the user for one stream and of the item for the other; here both read all features.
    """

    def __init__(self, config: FinalMLPConfig, input_dim: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList(_gate(config.gate, input_dim) for _ in range(2))
        self.streams = nn.ModuleList(stream.build(input_dim) for stream in (config.first, config.second))
        self.num_heads = config.num_heads
        first_dim, second_dim = config.first.hidden[-1], config.second.hidden[-1]
        self.linear = nn.Linear(first_dim + second_dim, config.fused_dim)
        self._shape = shape = (config.num_heads, first_dim // config.num_heads, second_dim // config.num_heads, config.fused_dim)
        # One matrix: the gradient of an axis of size 1 has strides that distributed training warns about.
        self.bilinear = nn.Parameter((torch.randn(shape) * (shape[0] * shape[1] * shape[2]) ** -0.5).view(first_dim, -1))
        self.output_dim = config.fused_dim

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, input_dim)``, float32 or bfloat16.

        Returns:
            ``(batch, fused_dim)``.
        """
        first, second = (stream(2 * gate(inputs).sigmoid() * inputs) for gate, stream in zip(self.gates, self.streams, strict=True))
        first_heads, second_heads = (torch.unflatten(outputs, 1, (self.num_heads, -1)) for outputs in (first, second))
        products = torch.einsum("bhi,hijo,bhj->bo", first_heads, self.bilinear.view(self._shape), second_heads)
        fused: Tensor = self.linear(torch.cat([first, second], dim=1)) + products
        return fused


def _gate(config: MLPConfig, input_dim: int) -> nn.Module:
    hidden = config.build(input_dim)
    return nn.Sequential(hidden, nn.Linear(hidden.output_dim, input_dim))
