"""One step of training: forward, backward, update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from mlenv.batch import Batch, Position
from mlenv.errors import ConfigError
from mlenv.loops.learning_rate import LearningRates
from mlenv.modules.objective import Objective

if TYPE_CHECKING:
    from mlenv.loops.fit import Progress


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves behind."""

    num_examples: int
    position: Position
    """Where the source continues after the batch that was trained."""
    losses: Tensor
    """``(terms,)`` float32, mean of each term of the objective, on the device: reading it waits for the step."""
    weights: Tensor
    """``(terms,)`` float32, sum of the weights that each term is a mean over."""
    is_skipped: bool = False
    """The model learned nothing from the batch, because its loss was bad."""


class TrainStep(Protocol):
    """Trains on the next batch; an eager step and one that reads ahead share the loop."""

    def advance(self, batches: Iterator[Batch], progress: Progress) -> StepOutput | None:
        """Runs forward, backward and update on the next batch; None once any rank has no more data."""
        ...


class EagerStep:
    """The plain step: one batch at a time, nothing overlapped.

    Args:
        optimizers: each is stepped after every backward pass; tables with a fused optimizer need none.
        objective: what the logits are measured by; its own parameters are among those of the optimizers.
        clip: parameters whose joint gradient norm is limited, and the limit; no limit at 0.
        rates: sets the learning rates of all optimizers; None keeps them.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        objective: Objective,
        clip: tuple[list[Tensor], float],
        rates: LearningRates | None,
    ) -> None:
        self._fabric, self._model, self._optimizers = fabric, model, optimizers
        self._objective, self._clip, self._rates = objective, clip, rates

    def advance(self, batches: Iterator[Batch], progress: Progress) -> StepOutput | None:
        """Trains on the next batch; None when there is none."""
        batch = next(batches, None)
        if batch is None:
            return None
        batch = batch.to(self._fabric.device, non_blocking=True)
        self._model.train()
        if self._rates is not None:
            self._rates.follow(progress)
        with self._fabric.autocast():
            logits = self._model(batch)
        check_logits(logits, batch)
        losses = self._objective(logits, batch)
        self._objective.backward(losses, self._fabric.backward)
        parameters, norm = self._clip
        if norm:
            nn.utils.clip_grad_norm_(parameters, norm)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return StepOutput(len(batch), batch.position, losses.terms, losses.weights)


def check_logits(logits: Tensor, batch: Batch) -> None:
    """Raises ConfigError unless a model gives one logit per example and task."""
    if logits.shape != batch.labels.shape:
        expected = f"logits of shape (batch, tasks) = {tuple(batch.labels.shape)}"
        raise ConfigError("model", expected=expected, received=tuple(logits.shape), fix="return one column per task of schema.labels")
