"""Optimizers of all that is not an embedding table, by kind. The table to choose from is in ``mlenv.config``.

Each has its state in place from the start, so that a checkpoint always has the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlenv.errors import ConfigError, check_above, check_at_least


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """Adam (Kingma and Ba 2015) with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    """Decay per step in units of the learning rate; biases and normalizations are spared."""
    gradient_clip_norm: float = 0.0
    """Largest norm of the gradient of the dense parameters, and of tables under Adam with them; 0 does not clip."""
    beta1: float = 0.9
    """Of the mean of the gradients."""
    beta2: float = 0.999
    """Of the mean of their squares."""
    eps: float = 1e-8
    """Added to the root of that."""

    def __post_init__(self) -> None:
        check_dense(self, "beta1", "beta2")
        check_at_least("eps", self.eps, 0)

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        groups, betas = decay_groups(parameters, self.weight_decay), (self.beta1, self.beta2)
        return with_adam_state(torch.optim.AdamW(groups, lr=self.learning_rate, betas=betas, eps=self.eps, fused=True))


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam (Kingma and Ba 2015) with an L2 penalty, whose gradient goes through the moments."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    """L2 penalty: this times a weight is added to its gradient; biases and normalizations are spared."""
    gradient_clip_norm: float = 0.0
    """Largest norm of the gradient of the dense parameters, and of tables under Adam with them; 0 does not clip."""
    beta1: float = 0.9
    """Of the mean of the gradients."""
    beta2: float = 0.999
    """Of the mean of their squares."""
    eps: float = 1e-8
    """Added to the root of that."""

    def __post_init__(self) -> None:
        check_dense(self, "beta1", "beta2")
        check_at_least("eps", self.eps, 0)

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        groups, betas = decay_groups(parameters, self.weight_decay), (self.beta1, self.beta2)
        return with_adam_state(torch.optim.Adam(groups, lr=self.learning_rate, betas=betas, eps=self.eps, fused=True))


@dataclass(frozen=True, kw_only=True)
class SGDConfig:
    """Stochastic gradient descent with heavy-ball momentum: ``m = momentum * m + gradient; w -= learning_rate * m``."""

    learning_rate: float = 0.01
    weight_decay: float = 0.0
    """L2 penalty: this times a weight is added to its gradient; biases and normalizations are spared."""
    gradient_clip_norm: float = 0.0
    """Largest norm of the gradient of the dense parameters, and of tables under Adam with them; 0 does not clip."""
    momentum: float = 0.9
    """Share of the step before that is gone again; 0 keeps no state."""

    def __post_init__(self) -> None:
        check_dense(self, "momentum")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        groups = decay_groups(parameters, self.weight_decay)
        sgd = torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, fused=True)
        if self.momentum:
            for parameter in parameters_of(sgd):
                sgd.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        return sgd


def check_dense(config: Any, *shares: str) -> None:
    """Checks what all these configs have, and that the fields ``shares`` lie in [0, 1).

    Raises:
        ConfigError: names the field.
    """
    check_above("learning_rate", config.learning_rate, 0)
    for name in ("weight_decay", "gradient_clip_norm"):
        check_at_least(name, getattr(config, name), 0)
    for name in shares:
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(name, expected="a number in [0, 1)", received=getattr(config, name))


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices, which decay, and vectors, that is biases and normalizations, which do not."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that an optimizer steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def with_adam_state(adam: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same Adam, with the state that its first step would make."""
    for parameter in parameters_of(adam):
        zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        adam.state[parameter] = {"step": torch.zeros((), device=parameter.device), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    return adam
