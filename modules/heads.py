"""One output per task on top of a shared bottom."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlenv.modules.mlp import MLPConfig


class TaskHeads(nn.Module):
    """A small network per task over the same shared representation.

    Source: Caruana, "Multitask Learning", Machine Learning 28, 1997 (hard parameter sharing).
    """

    def __init__(self, config: MLPConfig, input_dim: int, tasks: Sequence[str]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()
        for task in tasks:
            hidden = config.build(input_dim)
            self.heads[task] = nn.Sequential(hidden, nn.Linear(hidden.output_dim, 1))

    def forward(self, shared: Tensor) -> Tensor:
        """
        Args:
            shared: ``(batch, input_dim)``.

        Returns:
            logits ``(batch, tasks)`` float32, in the order of the tasks.
        """
        return torch.cat([head(shared) for head in self.heads.values()], dim=1).float()
