"""Plain layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mlenv.errors import ConfigError, check_at_least
from mlenv.modules.batch_norm import BatchNorm


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    hidden: tuple[int, ...] = (256, 128)
    """Width of each layer; empty passes the input through."""
    dropout: float = 0.0
    """Share of activations that a training step hides, after every layer."""
    normalization: Literal["none", "batch", "layer"] = "none"
    """What stands between a linear layer and its ReLU."""

    def __post_init__(self) -> None:
        for width in self.hidden:
            check_at_least("hidden", width, 1)
        check_dropout("dropout", self.dropout)

    def build(self, input_dim: int) -> MLP:
        return MLP(self, input_dim)


class MLP(nn.Module):
    """Linear layers, each followed by normalization, ReLU and dropout."""

    def __init__(self, config: MLPConfig, input_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = input_dim
        for hidden in config.hidden:
            layers.append(nn.Linear(width, hidden))
            if config.normalization != "none":
                layers.append(BatchNorm(hidden) if config.normalization == "batch" else nn.LayerNorm(hidden))
            layers.append(nn.ReLU())
            if config.dropout:
                layers.append(nn.Dropout(config.dropout))
            width = hidden
        self.layers = nn.Sequential(*layers)
        self.output_dim = width

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, input_dim)``, float32 or bfloat16.

        Returns:
            ``(batch, output_dim)``, same dtype.
        """
        outputs: Tensor = self.layers(inputs)
        return outputs


def check_dropout(key: str, value: float) -> None:
    """Raises ConfigError unless the value is a share below 1."""
    if not 0 <= value < 1:
        raise ConfigError(key, expected="a share in [0, 1)", received=value)
