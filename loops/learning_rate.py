"""Learning rates that follow the steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LinearDecay:
    """Lets every learning rate fall in a straight line, to one part in ``total_steps`` at the last step.

    The rate follows from the number of steps alone, which the first optimizer keeps in its state; so a resumed training
    goes on with the same rates.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], fused: torch.optim.Optimizer | None, total_steps: int) -> None:
        """
        Args:
            optimizers: those that are stepped after a backward pass.
            fused: the optimizer that TorchRec's tables run inside it; its step only hands its rates to them.
        """
        self._optimizers, self._fused, self._total_steps = optimizers, fused, total_steps
        every = [*optimizers, *([fused] if fused is not None else [])]
        self._groups = [(group, group["lr"]) for optimizer in every for group in optimizer.param_groups]
        self._steps_done: int | None = None

    def advance(self) -> None:
        """Sets the rates of the step that comes now; called before its backward pass, in which fused tables update themselves."""
        if self._steps_done is None:
            self._steps_done = _steps_done(self._optimizers[0])
        remaining = max(self._total_steps - self._steps_done, 0) / self._total_steps
        for group, rate in self._groups:
            group["lr"] = rate * remaining
        if self._fused is not None:
            self._fused.step()
        self._steps_done += 1


def _steps_done(optimizer: torch.optim.Optimizer) -> int:
    return int(next(iter(optimizer.state.values()))["step"])
