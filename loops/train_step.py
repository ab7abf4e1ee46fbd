"""One step of training: forward, backward, update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from mlenv.batch import Batch, Position
from mlenv.loops.learning_rate import LearningRates
from mlenv.loops.ranks import Shares, average_gradients, clip_gradients, summed, world_size
from mlenv.loops.weight_average import WeightAverage
from mlenv.modules.logits import check_logits
from mlenv.modules.objective import Losses, Objective

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from mlenv.loops.fit import Progress


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves behind."""

    num_examples: int
    """Of all ranks."""
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
    """The plain step: nothing overlapped.

    Args:
        optimizers: each is stepped after the backward pass; tables with a fused optimizer need none.
        objective: what the logits are measured by; its own parameters are among those of the optimizers.
        clip: parameters whose joint gradient norm is limited, and the limit; no limit at 0.
        rates: sets the learning rates of all optimizers; None keeps them.
        shares: rows of each rank. One that has no more goes on with fillers until all have trained on theirs.
        filler: rows that weigh nothing.
        average: follows the weights; None where there is none.
        num_batches: batches whose gradients are added up before the update, each weighed by its share of the weights, so that
            losses that are weighted means over rows have the gradient of one large batch. The last step takes what is left.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        objective: Objective,
        clip: tuple[list[Tensor], float],
        rates: LearningRates | None,
        shares: Shares,
        filler: Batch,
        average: WeightAverage | None = None,
        num_batches: int = 1,
    ) -> None:
        self._fabric, self._model, self._optimizers = fabric, model, optimizers
        self._objective, self._clip, self._rates = objective, clip, rates
        self._shares, self._filler = shares, filler
        self._average, self._num_batches = average, num_batches

    def advance(self, batches: Iterator[Batch], progress: Progress) -> StepOutput | None:
        """Trains on the next batch, or the next few; None when no rank has one."""
        group = list(islice(batches, self._num_batches))
        num_examples = sum(map(len, group)) if world_size() == 1 else self._shares.examples(progress.step)
        if not group and progress.step >= self._shares.num_steps:
            return None
        # Of several ranks each runs as many passes, because they wait for each other in them.
        missing = max((1 if world_size() == 1 else self._num_batches) - len(group), 0)
        group += [replace(self._filler, position=group[-1].position if group else progress.position)] * missing
        if not self._model.training:  # setting it walks through all modules, which a small model would feel at every step
            self._model.train()
        if self._rates is not None:
            self._rates.follow(progress)
        output = self._gradients(group, num_examples)
        average_gradients(self._objective.parameters())
        parameters, norm = self._clip
        if norm:
            clip_gradients(parameters, norm)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self._average is not None:
            self._average.follow(progress.step)
        return output

    def _gradients(self, group: list[Batch], num_examples: int) -> StepOutput:
        """Leaves the gradients of all batches in the parameters."""
        if len(group) == 1:
            losses = self._losses(group[0])
            self._objective.backward(over_all_ranks(losses, group[0]), self._fabric.backward)
            return StepOutput(num_examples, group[0].position, losses.terms, losses.weights)
        from mlenv.loops.strategy import without_synchronization  # it loads Lightning, which a dry run can do without

        weights = torch.stack([batch.weights.sum(0) for batch in group])  # on the host, where the batches come from
        total = weights.sum(0)
        shares = (weights / total.masked_fill(total == 0, 1)).to(self._fabric.device)
        total = total.to(self._fabric.device)
        terms, of_all = torch.zeros_like(total), share_of_rank(total)
        for place, (batch, share) in enumerate(zip(group, shares, strict=True), start=1):
            with nullcontext() if place == len(group) else without_synchronization(self._model):
                losses = self._losses(batch)
                self._objective.backward(replace(losses, tasks=losses.tasks * share * of_all), self._fabric.backward)
            terms += losses.terms * share
        return StepOutput(num_examples, group[-1].position, terms, total)

    def _losses(self, batch: Batch) -> Losses:
        batch = batch.to(self._fabric.device, non_blocking=True)
        with self._fabric.autocast():
            logits = self._model(batch)
        check_logits(logits, batch)
        losses: Losses = self._objective(logits, batch)
        return losses


def over_all_ranks(losses: Losses, batch: Batch) -> Losses:
    """Losses whose average over the ranks is the mean over the examples of all: those of a rank count by the weights of its labels."""
    if world_size() == 1:
        return losses
    return replace(losses, tasks=losses.tasks * share_of_rank(batch.weights.sum(0).to(losses.tasks.device)))


def share_of_rank(weights: Tensor) -> Tensor | float:
    """What the losses of this rank count for where gradients are averaged over the ranks; 1 on average.

    Args:
        weights: ``(tasks,)``, sum of those of its labels.
    """
    return 1.0 if world_size() == 1 else torch.nan_to_num(world_size() * weights / summed(weights))
