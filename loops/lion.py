"""Lion: steps of one size, in the direction that momentum and gradient point to together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlenv.loops.dense_optimizers import check_dense, decay_groups, parameters_of
from mlenv.loops.ranks import local


@dataclass(frozen=True, kw_only=True)
class LionConfig:
    """Lion (Chen et al. 2023, arXiv:2302.06675): half of Adam's state. The paper takes a learning rate three to ten times smaller
    than Adam's, and a decay as many times larger."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    """Decay per step in units of the learning rate; biases and normalizations are spared."""
    gradient_clip_norm: float = 0.0
    """Largest norm of the gradient of the dense parameters, and of tables under Adam with them; 0 does not clip."""
    beta1: float = 0.9
    """Share of the momentum in the direction of a step."""
    beta2: float = 0.99
    """Of the momentum, the mean of the gradients."""

    def __post_init__(self) -> None:
        check_dense(self, "beta1", "beta2")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        groups = decay_groups(parameters, self.weight_decay)
        return Lion(groups, lr=self.learning_rate, betas=(self.beta1, self.beta2))


class Lion(torch.optim.Optimizer):
    """``w -= lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * w); m = beta2 * m + (1 - beta2) * g``.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, arXiv:2302.06675, program 1.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})
        for parameter in parameters_of(self):
            self.state[parameter] = {"exp_avg": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the parameters that have a gradient."""
        assert closure is None, "this optimizer does not evaluate the loss itself"
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [local(parameter.grad) for parameter in parameters]
            momenta = [local(self.state[parameter]["exp_avg"]) for parameter in parameters]
            weights = [local(parameter) for parameter in parameters]
            beta1, beta2 = group["betas"]
            # As torch's own optimizers do: one call for all parameters, which on a GPU is one kernel.
            directions = torch._foreach_lerp(gradients, momenta, beta1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, directions, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)
