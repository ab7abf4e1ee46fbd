"""From logits to what a training step lowers, and back to gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlenv.batch import Batch
from mlenv.config import LossConfig, ObjectiveConfig
from mlenv.modules.distillation import Distillation, Teach
from mlenv.modules.pointwise_losses import BinaryCrossEntropyConfig
from mlenv.modules.task_balance import SummedLosses


@dataclass(frozen=True)
class Losses:
    """Losses of one step, on the device: reading them waits for it."""

    tasks: Tensor
    """``(tasks,)`` float32, with its graph: what is to be lowered for each task."""
    terms: Tensor
    """``(terms,)`` float32, without a graph: what to show, in the order of ``Objective.terms``."""
    weights: Tensor
    """``(terms,)`` float32, sum of the weights that each term is a mean over."""


class Objective(nn.Module):
    """Loss per task, what a teacher adds to it, and how the tasks are weighed. Its parameters are trained with the model's.

    Args:
        tasks: names of the columns of the logits.
        model: what is trained; parts of it are watched when the config asks for their gradients or inner layers.
        teach: gives the teacher's logits for a batch.
        num_steps: steps of the whole training, which the teacher's weight may follow.
        probe: any batch that the model takes; shows how wide inner layers are.

    Raises:
        ConfigError: the model lacks a part that the config names.
    """

    task_weights: Tensor
    columns: Tensor
    order: Tensor

    def __init__(
        self,
        config: ObjectiveConfig,
        tasks: Sequence[str],
        model: nn.Module,
        *,
        teach: Teach | None = None,
        num_steps: int = 1,
        probe: Batch | None = None,
    ) -> None:
        super().__init__()
        groups: list[tuple[LossConfig, list[int]]] = []
        for place, task in enumerate(tasks):
            loss: LossConfig = config.losses.get(task, BinaryCrossEntropyConfig())
            same = next((places for other, places in groups if other == loss), None)
            if same is None:
                groups.append((loss, [place]))
            else:
                same.append(place)
        # Tasks with the same loss are computed together. Where they lie is on the device: no step waits to send it there.
        self._counts = [len(places) for _, places in groups]
        columns = torch.tensor([place for _, places in groups for place in places])
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("order", columns.argsort(), persistent=False)
        self.losses = nn.ModuleList(loss.build() for loss, _ in groups)
        self.register_buffer("task_weights", torch.tensor([config.task_weights.get(task, 1.0) for task in tasks]), persistent=False)
        self.balance = SummedLosses() if config.balance is None else config.balance.build(len(tasks), model)
        # After the balance: where that cuts the graph, the teacher has to be compared with what lies above the cut.
        self.distillation: Distillation | None = None
        if config.distillation is not None:
            assert teach is not None, "a distillation needs a teacher"
            assert probe is not None, "a distillation needs a probe"
            self.distillation = Distillation(config.distillation, tasks, model, teach, num_steps, probe)
        self._tasks = tuple(tasks)
        self.terms = tuple(f"{task}/loss" for task in tasks) + (self.distillation.terms if self.distillation is not None else ())
        """Names of what is shown."""

    def forward(self, logits: Tensor, batch: Batch) -> Losses:
        """
        Args:
            logits: ``(batch, tasks)`` float32.
            batch: the examples that they belong to.
        """
        task_losses = self._task_losses(logits, batch)
        terms, weights = [task_losses.detach()], [batch.weights.sum(0)]
        if self.distillation is not None:
            taught = self.distillation(logits, batch)
            task_losses = task_losses + taught.tasks
            terms, weights = [*terms, taught.terms], [*weights, taught.weights]
        return Losses(task_losses * self.task_weights, torch.cat(terms), torch.cat(weights))

    def backward(self, losses: Losses, backward: Callable[..., Any]) -> None:
        """Leaves gradients in the parameters of the model and of the objective.

        Args:
            losses: of this step.
            backward: runs a scalar backward and takes ``retain_graph``.
        """
        self.balance.backward(losses.tasks, backward)  # type: ignore[operator]

    def gauges(self) -> dict[str, float]:
        """Weights of the tasks that change during the training, for the record; waits for the device."""
        weights: Tensor | None = self.balance.weights()  # type: ignore[operator]
        return {} if weights is None else {f"{task}/weight": value for task, value in zip(self._tasks, weights.tolist(), strict=True)}

    def _task_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        if len(self.losses) == 1:
            losses: Tensor = self.losses[0](logits, batch.labels, batch.weights, batch.requests)
            return losses
        groups = (
            torch.split(tensor.index_select(1, self.columns), self._counts, dim=1) for tensor in (logits, batch.labels, batch.weights)
        )
        parts = [loss(*columns, batch.requests) for loss, *columns in zip(self.losses, *groups, strict=True)]
        return torch.cat(parts).index_select(0, self.order)
