"""What a part of a model reads, watched from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlenv.errors import ConfigError, nearest


def find_part(model: nn.Module, name: str, key: str) -> nn.Module:
    """A submodule by its name in the model, also where the model is wrapped for several processes.

    Raises:
        ConfigError: at ``key``, when the model has no such part.
    """
    part: nn.Module
    for path, part in model.named_modules():
        if path == name or path.endswith(f"module.{name}"):
            return part
    known = [path for path, _ in model.named_children()]
    raise ConfigError(key, expected="the name of a part of the model", received=name, fix=nearest(name, known))


class WatchedInput:
    """Remembers what a part of a model last read: the last layer that all of its tasks share, say."""

    def __init__(self, part: nn.Module) -> None:
        self._value: Tensor | None = None
        part.register_forward_pre_hook(self._remember)

    def take(self) -> Tensor:
        """The tensor of the last forward pass, ``(batch, dim)``; it is forgotten here, so that nothing keeps its graph."""
        assert self._value is not None, "the part has read nothing since it was asked"
        value, self._value = self._value, None
        return value

    def _remember(self, part: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._value = inputs[0]


class CutInput:
    """Cuts the graph of a training step where a part of a model begins, so that each task's gradient can be seen there.

    The gradient of a loss with respect to the shared representation stands for its gradient with respect to the shared
    parameters, which it bounds and is far cheaper than: Sener and Koltun, "Multi-Task Learning as Multi-Objective
    Optimization", NeurIPS 2018, arXiv:1810.04650, section 3.3. The part below the cut runs backward once, however many
    tasks there are, so that embedding tables that update themselves during it do so once.
    """

    def __init__(self, part: nn.Module) -> None:
        self._below: Tensor | None = None
        self._above: Tensor | None = None
        part.register_forward_pre_hook(self._cut)

    def gradients(self, losses: Tensor, backward: Any) -> Tensor:
        """Runs each loss backward to the cut; parameters above it gather the gradients of all of them.

        Args:
            losses: ``(tasks,)``.
            backward: runs a scalar backward and takes ``retain_graph``.

        Returns:
            ``(tasks, batch, dim)``.
        """
        assert self._above is not None, "the part has read nothing since it was asked"
        gradients = []
        for task, loss in enumerate(losses.unbind()):
            backward(loss, retain_graph=task + 1 < len(losses))
            gradient, self._above.grad = self._above.grad, None
            gradients.append(torch.zeros_like(self._above) if gradient is None else gradient)
        return torch.stack(gradients)

    def finish(self, gradient: Tensor) -> None:
        """Runs the part below the cut backward from a gradient ``(batch, dim)``."""
        assert self._below is not None
        if self._below.requires_grad:
            torch.autograd.backward(self._below, gradient)
        self._below = self._above = None

    def _cut(self, part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (part.training and torch.is_grad_enabled()):
            return None
        self._below = inputs[0]
        self._above = inputs[0].detach().requires_grad_()
        return (self._above, *inputs[1:])
