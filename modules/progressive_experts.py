"""Experts of each task beside shared ones, layer upon layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlenv.errors import check_at_least
from mlenv.modules.experts import ExpertGates, ExpertNetworks, check_experts
from mlenv.modules.mlp import MLPConfig, check_dropout


@dataclass(frozen=True, kw_only=True)
class ProgressiveExpertsConfig:
    num_layers: int = 2
    """Extraction layers; a single one is CGC."""
    num_shared_experts: int = 2
    """Experts of each layer that every task draws on."""
    num_task_experts: int = 2
    """Experts of each layer and task that the other tasks do not draw on."""
    expert: MLPConfig = MLPConfig(hidden=(64,))
    """Layers of one expert."""
    expert_dropout: float = 0.0
    """Share of the experts that a training step hides from each gate; at least one stays."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_shared_experts", "num_task_experts"):
            check_at_least(name, getattr(self, name), 1)
        check_experts("expert", self.expert)
        check_dropout("expert_dropout", self.expert_dropout)

    def build(self, input_dim: int, tasks: Sequence[str]) -> ProgressiveExperts:
        return ProgressiveExperts(self, input_dim, tasks)


class ExtractionLayer(nn.Module):
    """Customized gate control: a task mixes its own experts and the shared ones; the shared path mixes all experts.

    ``task[k] = softmax(W[k] x[k]) . (experts of k at x[k], shared experts at x[s])``,
    ``shared = softmax(W[s] x[s]) . (experts of all tasks, shared experts at x[s])``

    Args:
        is_last: the shared path ends here, and its gate is left out.

    Source: Tang et al., "Progressive Layered Extraction", RecSys 2020, sections 4.1 and 4.2.
    """

    def __init__(self, config: ProgressiveExpertsConfig, input_dim: int, num_tasks: int, is_last: bool) -> None:
        super().__init__()
        own, shared, dropout = config.num_task_experts, config.num_shared_experts, config.expert_dropout
        self.task_experts = ExpertNetworks(config.expert, input_dim, own, num_groups=num_tasks)
        self.shared_experts = ExpertNetworks(config.expert, input_dim, shared)
        self.task_gates = ExpertGates(input_dim, own + shared, num_tasks, dropout)
        self.shared_gate = None if is_last else ExpertGates(input_dim, num_tasks * own + shared, 1, dropout)
        self.output_dim = self.task_experts.output_dim
        self._counts = own, shared

    def forward(self, by_task: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            by_task: ``(batch, tasks, input_dim)``, or ``(batch, 1, input_dim)`` for the same to all tasks.
            shared: ``(batch, 1, input_dim)``.

        Returns:
            ``(batch, tasks, output_dim)`` and ``(batch, 1, output_dim)``; in the last layer the second is what came in.
        """
        task_experts, shared_experts = self.task_experts(by_task), self.shared_experts(shared).squeeze(1)
        of_task, of_shared = self.task_gates(by_task).to(by_task.dtype).split(self._counts, dim=2)
        mixed = torch.einsum("bte,bteo->bto", of_task, task_experts) + torch.einsum("bte,beo->bto", of_shared, shared_experts)
        if self.shared_gate is None:
            return mixed, shared
        all_experts = torch.cat([task_experts.flatten(1, 2), shared_experts], dim=1)
        return mixed, torch.einsum("bse,beo->bso", self.shared_gate(shared).to(shared.dtype), all_experts)


class ProgressiveExperts(nn.Module):
    """Progressive layered extraction: tasks and the shared path start from the same inputs and part layer by layer.

    The experts of one layer have one width for all tasks; the paper allows each task its own.

    Source: Tang et al., "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning (MTL) Model for Personalized
    Recommendations", RecSys 2020, section 4.2.
    """

    def __init__(self, config: ProgressiveExpertsConfig, input_dim: int, tasks: Sequence[str]) -> None:
        super().__init__()
        self._tasks = tuple(tasks)
        self.layers = nn.ModuleList()
        self.output_dim = input_dim
        for place in range(config.num_layers):
            layer = ExtractionLayer(config, self.output_dim, len(tasks), is_last=place == config.num_layers - 1)
            self.layers.append(layer)
            self.output_dim = layer.output_dim

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            inputs: ``(batch, input_dim)``, float32 or bfloat16.

        Returns:
            one ``(batch, output_dim)`` per task.
        """
        by_task = shared = inputs.unsqueeze(1)
        for layer in self.layers:
            by_task, shared = layer(by_task, shared)
        return by_task.unbind(1)

    def gate_weights(self) -> dict[str, Tensor]:
        """Mean weight of each expert in the last training step, ``(experts,)`` by ``layer/task`` and ``layer/shared``.

        The experts of a task's gate are its own, then the shared ones; those of a shared gate are the experts of all tasks
        in their order, then the shared ones. Empty before the first step.
        """
        weights: dict[str, Tensor] = {}
        for place, layer in enumerate(self.layers):
            for names, gates in ((self._tasks, layer.task_gates), (("shared",), layer.shared_gate)):
                if isinstance(gates, ExpertGates) and gates.mean_weights is not None:
                    weights |= {f"{place}/{name}": means for name, means in zip(names, gates.mean_weights, strict=True)}
        return weights
