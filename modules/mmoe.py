"""Experts that all tasks share, mixed anew for each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlenv.errors import check_at_least
from mlenv.modules.experts import ExpertGates, ExpertNetworks, check_experts
from mlenv.modules.mlp import MLPConfig, check_dropout


@dataclass(frozen=True, kw_only=True)
class MMoEConfig:
    num_experts: int = 8
    """Experts that every task may draw on."""
    expert: MLPConfig = MLPConfig(hidden=(64,))
    """Layers of one expert."""
    expert_dropout: float = 0.0
    """Share of the experts that a training step hides from each gate; at least one stays."""

    def __post_init__(self) -> None:
        check_at_least("num_experts", self.num_experts, 1)
        check_experts("expert", self.expert)
        check_dropout("expert_dropout", self.expert_dropout)

    def build(self, input_dim: int, tasks: Sequence[str]) -> MMoE:
        return MMoE(self, input_dim, tasks)


class MMoE(nn.Module):
    """Multi-gate mixture of experts.

    ``f[k](x) = sum over i of g[k](x)[i] * expert[i](x)`` for task k, with ``g[k](x) = softmax(W[k] x)``

    Source: Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", KDD 2018,
    section 4.2.
    """

    def __init__(self, config: MMoEConfig, input_dim: int, tasks: Sequence[str]) -> None:
        super().__init__()
        self._tasks = tuple(tasks)
        self.experts = ExpertNetworks(config.expert, input_dim, config.num_experts)
        self.gates = ExpertGates(input_dim, config.num_experts, len(tasks), config.expert_dropout)
        self.output_dim = self.experts.output_dim

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            inputs: ``(batch, input_dim)``, float32 or bfloat16.

        Returns:
            one ``(batch, output_dim)`` per task.
        """
        shared = inputs.unsqueeze(1)
        mixed = torch.einsum("bte,beo->bto", self.gates(shared).to(inputs.dtype), self.experts(shared).squeeze(1))
        return mixed.unbind(1)

    def gate_weights(self) -> dict[str, Tensor]:
        """Mean weight of each expert in the last training step, ``(experts,)`` by task; empty before the first."""
        means = self.gates.mean_weights
        return {} if means is None else dict(zip(self._tasks, means, strict=True))
