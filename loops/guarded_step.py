"""Steps that look at the loss before the model learns from it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mlenv.batch import Batch
from mlenv.config import LoopConfig
from mlenv.errors import TrainingError
from mlenv.loops.fit import Progress
from mlenv.loops.ranks import all_ranks, any_rank
from mlenv.loops.train_step import StepOutput, TrainStep
from mlenv.loops.training_state import changing_buffers, put_back, random_tensors, set_random_tensors
from mlenv.modules.objective import Losses, Objective

logger = logging.getLogger(__name__)


class _BadLossError(Exception):
    """Cuts a step short between its loss and its backward pass, with which TorchRec already updates tables."""


class GuardedStep:
    """A step that does not learn from a loss that is no number or above ``loop.max_loss``: the model stays as it was before.

    Reading the loss waits for the device at every step.

    Args:
        step: makes the losses by calling ``objective`` and then runs them backward.
        keep: writes a bad step down, of a model that is as it was before the step, and says where it went wrong and where it is kept.
        filler: rows that weigh nothing.
    """

    def __init__(
        self,
        step: TrainStep,
        model: nn.Module,
        objective: Objective,
        optimizers: list[torch.optim.Optimizer],
        config: LoopConfig,
        keep: Callable[[Progress, Batch], str],
        filler: Batch,
    ) -> None:
        self._step, self._objective, self._optimizers, self._config, self._keep = step, objective, optimizers, config, keep
        self._filler, self._is_guarding = filler, False
        self._buffers = changing_buffers(model, objective)
        objective.register_forward_hook(self._look_at)

    def advance(self, batches: Iterator[Batch], progress: Progress) -> StepOutput | None:
        """Trains on the next batch, or passes over it.

        Raises:
            TrainingError: the loss is bad, and ``loop.on_bad_loss`` is stop or has been skip too often.
        """
        taken: list[Batch] = []
        random, buffers = random_tensors(), [buffer.clone() for buffer in self._buffers]
        self._is_guarding = True
        try:
            return self._step.advance(_noted(batches, taken), progress)
        except _BadLossError as error:
            reason = str(error)
        finally:
            self._is_guarding = False
        set_random_tensors(random)
        put_back(self._buffers, buffers)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        batch = taken[-1] if taken else replace(self._filler, position=progress.position)  # this rank's rows may be used up
        kept = self._keep(progress, batch)
        found = f"step {progress.step + 1}: {reason}; {kept}"
        if self._config.on_bad_loss == "stop":
            fix = "lower the learning rates, set optimizer.gradient_clip_norm, mend the rows, or pass over them: loop.on_bad_loss=skip"
            raise TrainingError(f"{found}. Fix: {fix}.")
        if progress.skipped_steps >= self._config.max_skipped_steps:
            fix = "see why there are so many, or raise loop.max_skipped_steps"
            raise TrainingError(f"{found}. {progress.skipped_steps} steps were skipped before, as many as may be. Fix: {fix}.")
        logger.warning("%s. The step is skipped.", found)
        nothing = torch.zeros(len(self._objective.terms), device=self._objective.task_weights.device)
        before = [progress.position, *(one.position for one in taken)]
        own = sum(len(one) for one, place in zip(taken, before, strict=False) if one.position != place)  # a filler leads no further
        num_examples = sum(number for (number,) in all_ranks((own,)))
        return StepOutput(num_examples, batch.position, nothing, nothing, is_skipped=True)

    def _look_at(self, objective: nn.Module, inputs: Any, losses: Losses) -> None:
        if not self._is_guarding:
            return
        limit = self._config.max_loss if self._config.max_loss is not None else math.inf
        values, weights = torch.stack([losses.terms, losses.weights]).tolist()
        bad = [
            f"{term!r} is {value:.6g} over a weight of {weight:.6g}"
            for term, value, weight in zip(self._objective.terms, values, weights, strict=True)
            if not (math.isfinite(value) and math.isfinite(weight) and value <= limit)
        ]
        if any_rank(bool(bad)):
            raise _BadLossError(", ".join(bad) or "the loss of another process is bad")


def _noted(batches: Iterator[Batch], taken: list[Batch]) -> Iterator[Batch]:
    for batch in batches:
        taken.append(batch)
        yield batch
