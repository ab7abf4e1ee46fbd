"""A running average of the weights: what is evaluated, predicted with and served, while the last weights are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mlenv.loops.ranks import local

TRAINED = "trained."
"""Stands in a checkpoint before the names of the weights that a training goes on with. The average has the plain names, so that
whoever loads the model gets it, and need not know that there is one."""


class WeightAverage:
    """``average = decay * average + (1 - decay) * weight`` after every step, with ``decay = min(ema_decay, (1 + t) / (10 + t))``
    after ``t`` steps before, so that the first weights are soon forgotten.

    Source: Polyak and Juditsky 1992; the decay at the start is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """
        Args:
            parameters: by the names that they have in a checkpoint.
        """
        self._names, self._decay = tuple(parameters), decay
        self._parameters = [parameter.detach() for parameter in parameters.values()]
        self._averages = [parameter.clone() for parameter in self._parameters]

    def follow(self, step: int) -> None:
        """Takes in the weights that a step has left; ``step`` counts those before it, so nothing else has to be kept."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([local(average) for average in self._averages], [local(weight) for weight in self._parameters], 1 - decay)

    def restart(self) -> None:
        """The average is the weights as they are."""
        torch._foreach_copy_([local(average) for average in self._averages], [local(weight) for weight in self._parameters])

    def tensors(self) -> dict[str, Tensor]:
        """What belongs in a checkpoint, beside or in place of the model's own tensors."""
        averages = dict(zip(self._names, self._averages, strict=True))
        return averages | {f"{TRAINED}{name}": weight for name, weight in zip(self._names, self._parameters, strict=True)}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average inside of this, and its own weights again afterwards, to the bit."""
        weights = [local(parameter).clone() for parameter in self._parameters]
        parts = [local(parameter) for parameter in self._parameters]
        torch._foreach_copy_(parts, [local(average) for average in self._averages])
        try:
            yield
        finally:
            torch._foreach_copy_(parts, weights)
