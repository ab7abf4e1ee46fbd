"""Learning rates that follow the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from mlenv.loops.fit import Progress

Schedule = Callable[[float, "Progress"], float]
"""From an initial learning rate and the progress to the rate of the next step."""

PLATEAU_FACTOR: Final = 0.1
SMALLEST_RATE: Final = 1e-6


class LearningRates:
    """Sets every learning rate before each step.

    Rates follow from the progress alone, so a resumed training goes on with the same ones.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], fused: torch.optim.Optimizer | None, schedule: Schedule) -> None:
        """
        Args:
            optimizers: those that are stepped after a backward pass.
            fused: the optimizer that TorchRec's tables run inside it; its step only hands its rates to them.
        """
        self._fused, self._schedule = fused, schedule
        every = [*optimizers, *([fused] if fused is not None else [])]
        self._groups = [(group, group["lr"]) for optimizer in every for group in optimizer.param_groups]

    def follow(self, progress: Progress) -> None:
        """Sets the rates of the step that comes now; called before its backward pass, in which fused tables update themselves."""
        for group, rate in self._groups:
            group["lr"] = self._schedule(rate, progress)
        if self._fused is not None:
            self._fused.step()


def linear_decay(total_steps: int) -> Schedule:
    """A straight line to one part in ``total_steps`` at the last step."""
    return lambda rate, progress: rate * (max(total_steps - progress.step, 0) / total_steps)


def plateau_decay(rate: float, progress: Progress) -> float:
    """A tenth at every evaluation without a better monitor; not below 1e-6, unless the rate starts there."""
    return max(rate * PLATEAU_FACTOR**progress.decays, min(rate, SMALLEST_RATE))
