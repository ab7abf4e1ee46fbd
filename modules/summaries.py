"""Groups of features, each in one short vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlenv.errors import ConfigError, nearest, placed_under
from mlenv.modules.mlp import MLPConfig


@dataclass(frozen=True, kw_only=True)
class SummaryConfig:
    features: tuple[str, ...]
    """What is summarized: features of any kind. One may be in several groups."""
    mlp: MLPConfig = MLPConfig(hidden=(32,))
    """Network over their vectors, side by side; its last layer is as wide as the summary."""

    def __post_init__(self) -> None:
        if not self.features or len(set(self.features)) != len(self.features):
            raise ConfigError("features", expected="at least one feature, each once", received=self.features)
        if not self.mlp.hidden:
            raise ConfigError("mlp.hidden", expected="at least one layer", received=self.mlp.hidden)


class Summaries(nn.Module):
    """Replaces groups of fields by one field each; what is in no group stays as it is and comes first.

    Args:
        configs: groups by name.
        features: feature of each field of the input.
        field_dims: width of each field of the input.

    Raises:
        ConfigError: a group names a feature that is not there.
    """

    def __init__(self, configs: Mapping[str, SummaryConfig], features: Sequence[str], field_dims: Sequence[int]) -> None:
        super().__init__()
        self._input_dims, self._groups = list(field_dims), []
        self.mlps = nn.ModuleList()
        for name, config in configs.items():
            with placed_under(name):
                for feature in (feature for feature in config.features if feature not in features):
                    raise ConfigError("features", expected="features of the schema", received=feature, fix=nearest(feature, features))
            self._groups.append([features.index(feature) for feature in config.features])
            self.mlps.append(config.mlp.build(sum(field_dims[place] for place in self._groups[-1])))
        grouped = {place for group in self._groups for place in group}
        self._kept = [place for place in range(len(features)) if place not in grouped]
        self.field_dims = (*(field_dims[place] for place in self._kept), *(config.mlp.hidden[-1] for config in configs.values()))
        """Width of each field of the output: those in no group in their order, then one per group."""

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, sum of the input's field_dims)``, float32 or bfloat16.

        Returns:
            ``(batch, sum of field_dims)``.
        """
        fields = torch.split(inputs, self._input_dims, dim=1)
        summaries = [mlp(torch.cat([fields[place] for place in group], dim=1)) for mlp, group in zip(self.mlps, self._groups, strict=True)]
        return torch.cat([*(fields[place] for place in self._kept), *summaries], dim=1)
