"""One output per task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlenv.errors import ConfigError
from mlenv.modules.mlp import MLPConfig


class TaskHeads(nn.Module):
    """A small network per task."""

    def __init__(self, config: MLPConfig, input_dim: int, tasks: Sequence[str]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()
        for task in tasks:
            if hasattr(self.heads, task):
                raise ConfigError(f"schema.labels.{task}", expected="a name that PyTorch's modules do not use themselves", received=task)
            hidden = config.build(input_dim)
            self.heads[task] = nn.Sequential(hidden, nn.Linear(hidden.output_dim, 1))

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """
        Args:
            inputs: one ``(batch, input_dim)`` per task, in the order of the tasks.

        Returns:
            logits ``(batch, tasks)`` float32, in the order of the tasks.
        """
        return torch.cat([head(own) for head, own in zip(self.heads.values(), inputs, strict=True)], dim=1).float()
