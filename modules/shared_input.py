"""What a part of a model reads, watched from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlenv.errors import ConfigError, nearest

_WRAPPERS = ("", "module.", "_dmp_wrapped_module.", "_dmp_wrapped_module.module.")
"""Before the names of a model's parts where it is wrapped for several processes."""


class WatchedInput:
    """Remembers what a part of a model last read: the last layer that all of its tasks share, say.

    Raises:
        ConfigError: at ``key``, when the model has no part of this name, or the part reads something else than one
            ``(batch, dim)`` tensor, which the first forward pass shows.
    """

    def __init__(self, model: nn.Module, name: str, key: str) -> None:
        self._name, self._key = name, key
        self._value: Tensor | None = None
        _find(model, name, key).register_forward_pre_hook(self._remember)

    def take(self) -> Tensor:
        """The tensor of the last forward pass, ``(batch, dim)``; it is forgotten here, so that nothing keeps its graph."""
        if self._value is None:
            raise ConfigError(self._key, expected="a part that a forward pass of the model calls", received=self._name)
        value, self._value = self._value, None
        return value

    def _remember(self, part: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._value = _matrix(inputs, self._name, self._key)


class CutInput:
    """Cuts the graph of a training step where a part of a model begins, so that each task's gradient can be seen there.

    The gradient of a loss with respect to the shared representation stands for its gradient with respect to the shared
    parameters, which it bounds and is far cheaper than: Sener and Koltun, "Multi-Task Learning as Multi-Objective
    Optimization", NeurIPS 2018, arXiv:1810.04650, section 3.3. The part below the cut runs backward once, however many
    tasks there are, so that embedding tables that update themselves during it do so once.

    Raises:
        ConfigError: as of ``WatchedInput``; or the losses also reach what the part reads by another way, which the first
            backward pass shows.
    """

    def __init__(self, model: nn.Module, name: str, key: str) -> None:
        self._name, self._key = name, key
        self._below: Tensor | None = None
        self._above: Tensor | None = None
        self._is_checked = False
        _find(model, name, key).register_forward_pre_hook(self._cut)

    def gradients(self, losses: Tensor, backward: Any) -> Tensor:
        """Runs each loss backward to the cut; parameters above it gather the gradients of all of them.

        Args:
            losses: ``(tasks,)``.
            backward: runs a scalar backward and takes ``retain_graph``.

        Returns:
            ``(tasks, batch, dim)``.
        """
        if self._above is None:
            raise ConfigError(self._key, expected="a part that a forward pass of the model calls", received=self._name)
        self._check_no_way_around(losses)
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

    def _check_no_way_around(self, losses: Tensor) -> None:
        """In the first step only: what goes around the cut would run backward once per task."""
        if self._is_checked or self._below is None or not self._below.requires_grad:
            return
        self._is_checked = True
        if torch.autograd.grad(losses.sum(), self._below, retain_graph=True, allow_unused=True)[0] is not None:
            fix = "name the part where the tasks part, 'experts' of a ranker"
            raise ConfigError(self._key, expected="a part that nothing which it reads goes around", received=self._name, fix=fix)

    def _cut(self, part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (part.training and torch.is_grad_enabled()):
            return None
        self._below = _matrix(inputs, self._name, self._key)
        self._above = self._below.detach().requires_grad_()
        return (self._above, *inputs[1:])


def _find(model: nn.Module, name: str, key: str) -> nn.Module:
    parts: dict[str, nn.Module] = dict(model.named_modules())
    for wrapper in _WRAPPERS:
        if name and wrapper + name in parts:
            return parts[wrapper + name]
    fix = nearest(name, [path for path, _ in model.named_children()])
    raise ConfigError(key, expected="the name of a part of the model", received=name, fix=fix)


def _matrix(inputs: tuple[Any, ...], name: str, key: str) -> Tensor:
    first = inputs[0] if inputs else None
    if isinstance(first, Tensor) and first.is_floating_point() and first.ndim == 2:
        return first
    received = f"{name}, which reads {type(first).__name__}"
    raise ConfigError(key, expected="a part of the model that reads one (batch, dim) tensor", received=received)
