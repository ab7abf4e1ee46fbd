"""Learning rates that follow the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import torch

from mlenv.config import LoopConfig
from mlenv.errors import ConfigError

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


def schedule_of(config: LoopConfig, total_steps: int) -> Schedule | None:
    """What a config asks for; None keeps the rates as they are.

    Raises:
        ConfigError: the training ends before its warm-up.
    """
    warmup, decay = config.warmup_steps, config.learning_rate_decay
    if warmup >= max(total_steps, 1):
        expected = f"fewer than the {total_steps} steps of the training"
        raise ConfigError("loop.warmup_steps", expected=expected, received=warmup, fix="shorten the warm-up, or train longer")
    decays = {"linear": linear_decay(total_steps, warmup), "cosine": cosine_decay(total_steps, warmup), "plateau": plateau_decay}
    if not warmup:
        return decays.get(decay)
    return with_warmup(decays.get(decay, constant), warmup, config.warmup_start)


def constant(rate: float, progress: Progress) -> float:
    """The rate as it is."""
    return rate


def with_warmup(schedule: Schedule, warmup_steps: int, start: float) -> Schedule:
    """A schedule times a straight line from ``start`` at the first step to 1 after ``warmup_steps`` steps.

    Source: Goyal et al., "Accurate, Large Minibatch SGD", 2017, arXiv:1706.02677, section 2.2.
    """

    def warmed(rate: float, progress: Progress) -> float:
        return schedule(rate, progress) * min(start + (1 - start) * progress.step / warmup_steps, 1.0)

    return warmed


def linear_decay(total_steps: int, warmup_steps: int = 0) -> Schedule:
    """A straight line, from the end of the warm-up on, to one part in the steps that follow it at the last step."""
    return lambda rate, progress: rate * _remaining(progress.step, total_steps, warmup_steps)


def cosine_decay(total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Half a cosine, from the end of the warm-up on: slow at first and at the end, where it comes to zero after the last step.

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017, arXiv:1608.03983, equation 5, without restarts.
    """
    return lambda rate, progress: rate * (1 - math.cos(math.pi * _remaining(progress.step, total_steps, warmup_steps))) / 2


def _remaining(step: int, total_steps: int, warmup_steps: int) -> float:
    """Share of the steps after the warm-up that are still to come."""
    length = total_steps - warmup_steps
    return min(max(total_steps - step, 0), length) / length


def plateau_decay(rate: float, progress: Progress) -> float:
    """A tenth at every evaluation without a better monitor; not below 1e-6, unless the rate starts there."""
    return max(rate * PLATEAU_FACTOR**progress.decays, min(rate, SMALLEST_RATE))
