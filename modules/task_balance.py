"""Weighing the losses of several tasks against each other while they are learnt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlenv.errors import check_above, check_at_least
from mlenv.modules.shared_input import CutInput

_PART = "objective.balance.part"

Backward = Callable[..., Any]
"""Runs a scalar backward; takes ``retain_graph``."""


class SummedLosses(nn.Module):
    """Adds the losses up."""

    def backward(self, losses: Tensor, backward: Backward) -> None:
        """
        Args:
            losses: ``(tasks,)``.
            backward: runs a scalar backward.
        """
        backward(losses.sum())

    def weights(self) -> Tensor | None:
        """Weight of each task, ``(tasks,)``, where it changes during the training."""
        return None


@dataclass(frozen=True, kw_only=True)
class UncertaintyConfig:
    def build(self, num_tasks: int, model: nn.Module) -> UncertaintyWeights:
        return UncertaintyWeights(num_tasks)


class UncertaintyWeights(nn.Module):
    """Learns how noisy each task is, and weighs it by that: ``sum of exp(-s[k]) * loss[k] + s[k] / 2``.

    ``s[k]`` is the logarithm of the variance of task k, 0 at the start, which gives every task the weight 1. A task without
    an example in the batch is left out of both sums, so that its variance does not shrink meanwhile.

    Source: Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
    Semantics", CVPR 2018, arXiv:1705.07115, section 3.2, in its form for classification.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(num_tasks))

    def backward(self, losses: Tensor, backward: Backward) -> None:
        """
        Args:
            losses: ``(tasks,)``.
            backward: runs a scalar backward.
        """
        is_present = losses.detach() > 0
        backward((losses * (-self.log_variances).exp() + 0.5 * self.log_variances * is_present).sum())

    def weights(self) -> Tensor:
        """Weight of each task, ``(tasks,)``."""
        return (-self.log_variances.detach()).exp()


@dataclass(frozen=True, kw_only=True)
class GradNormConfig:
    asymmetry: float = 1.5
    """How hard a task that learns slowly is pushed; 0 only makes the gradients of all tasks equally large."""
    learning_rate: float = 0.025
    """Of the weights themselves."""
    part: str = "experts"
    """Part of the model whose input all tasks share."""

    def __post_init__(self) -> None:
        check_at_least("asymmetry", self.asymmetry, 0)
        check_above("learning_rate", self.learning_rate, 0)

    def build(self, num_tasks: int, model: nn.Module) -> GradNorm:
        return GradNorm(self, num_tasks, CutInput(model, self.part, _PART))


class GradNorm(nn.Module):
    """Moves the weights of the tasks until their gradients are as large as their progress asks for.

    With ``G[k]`` the norm of the gradient of ``w[k] * loss[k]`` and ``r[k]`` the share of its first loss that task k still
    has, divided by the mean of that share, the weights go down the gradient of ``sum of |G[k] - mean(G) * r[k] ** asymmetry|``,
    the target held fixed. They stay positive and sum to the number of tasks.

    Source: Chen et al., "GradNorm", ICML 2018, arXiv:1711.02257, section 3. The gradients are those of the shared
    representation (see ``CutInput``) where the paper takes those of the last shared layer's weights, and are measured in
    their mean norm, so that the learning rate has the same effect whatever the scale of the losses. A task without an
    example in the first steps takes its first loss from the step that has one.
    """

    task_weights: Tensor
    first_losses: Tensor

    def __init__(self, config: GradNormConfig, num_tasks: int, cut: CutInput) -> None:
        super().__init__()
        self._config, self._cut = config, cut
        self.register_buffer("task_weights", torch.ones(num_tasks))
        self.register_buffer("first_losses", torch.zeros(num_tasks))

    def backward(self, losses: Tensor, backward: Backward) -> None:
        """
        Args:
            losses: ``(tasks,)``.
            backward: runs a scalar backward.
        """
        gradients = self._cut.gradients(losses * self.task_weights, backward)
        self._cut.finish(gradients.sum(0))
        with torch.no_grad():
            self._update(losses, gradients.flatten(1).float().norm(dim=1))

    def weights(self) -> Tensor:
        """Weight of each task, ``(tasks,)``."""
        return self.task_weights

    def _update(self, losses: Tensor, norms: Tensor) -> None:
        is_present = losses > 0
        self.first_losses.copy_(torch.where((self.first_losses == 0) & is_present, losses, self.first_losses))
        remaining = torch.where(is_present, losses / self.first_losses.clamp(min=1e-12), 1.0)
        norms = norms / norms.mean().clamp(min=1e-30)
        target = (remaining / remaining.mean()) ** self._config.asymmetry
        slopes = torch.where(is_present, (norms - target).sign() * norms / self.task_weights, 0.0)
        moved = (self.task_weights - self._config.learning_rate * slopes).clamp(min=1e-3)
        self.task_weights.copy_(moved * len(moved) / moved.sum())


@dataclass(frozen=True, kw_only=True)
class PCGradConfig:
    part: str = "experts"
    """Part of the model whose input all tasks share."""

    def build(self, num_tasks: int, model: nn.Module) -> PCGrad:
        return PCGrad(CutInput(model, self.part, _PART))


class PCGrad(nn.Module):
    """Takes out of each task's gradient what goes against another task's.

    For each task, the others in random order: where ``<g, h> < 0``, ``g`` becomes ``g - <g, h> / <h, h> * h`` with ``h``
    the other task's own gradient. What is left of all tasks is added up. Layers above the shared ones are not touched.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, arXiv:2001.06782, algorithm 1. The gradients
    are those of the shared representation (see ``CutInput``) where the paper takes those of the shared parameters.
    """

    def __init__(self, cut: CutInput) -> None:
        super().__init__()
        self._cut = cut

    def backward(self, losses: Tensor, backward: Backward) -> None:
        """
        Args:
            losses: ``(tasks,)``.
            backward: runs a scalar backward.
        """
        self._cut.finish(without_conflicts(self._cut.gradients(losses, backward)))

    def weights(self) -> None:
        """None: every task weighs the same."""
        return None


def without_conflicts(gradients: Tensor) -> Tensor:
    """The sum of the gradients of all tasks, each without what goes against another; never waits for the device.

    Args:
        gradients: ``(tasks, ...)``.

    Returns:
        the shape of one task's gradient.
    """
    flat = gradients.flatten(1).to(torch.promote_types(gradients.dtype, torch.float32))
    squares = flat.square().sum(1).clamp(min=1e-30)
    total = torch.zeros_like(flat[0])
    for task in range(len(flat)):
        gradient = flat[task]
        for other in (other for other in torch.randperm(len(flat)).tolist() if other != task):
            gradient = gradient - (gradient @ flat[other]).clamp(max=0) / squares[other] * flat[other]
        total = total + gradient
    return total.view(gradients.shape[1:]).to(gradients.dtype)
