"""One representation for all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class SharedBottomConfig:
    def build(self, input_dim: int, tasks: Sequence[str]) -> SharedBottom:
        return SharedBottom(input_dim, tasks)


class SharedBottom(nn.Module):
    """Gives every task the same inputs.

    Source: Caruana, "Multitask Learning", Machine Learning 28, 1997 (hard parameter sharing).
    """

    def __init__(self, input_dim: int, tasks: Sequence[str]) -> None:
        super().__init__()
        self.num_tasks, self.output_dim = len(tasks), input_dim

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            inputs: ``(batch, input_dim)``.

        Returns:
            one ``(batch, output_dim)`` per task.
        """
        return (inputs,) * self.num_tasks
