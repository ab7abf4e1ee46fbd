"""Many small networks, and the gates that mix what they say."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlenv.errors import ConfigError
from mlenv.modules.batch_norm import BatchNorm
from mlenv.modules.mlp import MLPConfig


class ExpertNetworks(nn.Module):
    """Groups of MLPs of one shape, each with weights of its own; one batched product per layer computes them all.

    The experts of a group see the same inputs. An expert is what ``MLP`` is: linear layers, each followed by
    normalization, ReLU and dropout.
    """

    def __init__(self, config: MLPConfig, input_dim: int, num_experts: int, num_groups: int = 1) -> None:
        super().__init__()
        self.weights, self.biases, self.normalizations = nn.ParameterList(), nn.ParameterList(), nn.ModuleList()
        width = input_dim
        for hidden in config.hidden:
            self.weights.append(_uniform((num_groups * num_experts * width, hidden), width))
            channels = num_groups * num_experts * hidden
            self.biases.append(_uniform((channels,), width))  # flat, because weight decay spares vectors
            if config.normalization == "batch":
                self.normalizations.append(BatchNorm(channels))
            elif config.normalization == "layer":  # one group of channels is one expert
                self.normalizations.append(nn.GroupNorm(num_groups * num_experts, channels))
            width = hidden
        self.dropout = nn.Dropout(config.dropout)
        self._shape = num_groups, num_experts
        self.output_dim = width

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, groups, input_dim)``, or ``(batch, 1, input_dim)`` for the same to all groups; float32 or bfloat16.

        Returns:
            ``(batch, groups, experts, output_dim)``, same dtype.
        """
        outputs = inputs.unsqueeze(2)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            outputs = torch.einsum("bgei,geio->bgeo", outputs, weight.view(*self._shape, outputs.shape[-1], -1))
            outputs = outputs + bias.view(*self._shape, -1).to(outputs.dtype)  # autocast lowers products only
            if self.normalizations:
                outputs = self.normalizations[layer](outputs.flatten(1)).view(outputs.shape)
            outputs = self.dropout(functional.relu(outputs))
        return outputs


class ExpertGates(nn.Module):
    """Weights of experts, one set per gate, that follow from the inputs and sum to 1: ``g[k](x) = softmax(W[k] x)``.

    With dropout, a training step hides each expert from a gate, example by example, and the weights of the others are
    scaled up to sum to 1; the expert that drew the largest number stays in any case. It keeps a gate from giving all its
    weight to one expert.

    Source: Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", KDD 2018,
    section 4.2; for the dropout Zhao et al., "Recommending What Video to Watch Next", RecSys 2019.
    """

    mean_weights: Tensor | None
    """``(gates, experts)`` float32, mean over the examples of the last training step, experts hidden as they were; on the device."""

    def __init__(self, input_dim: int, num_experts: int, num_gates: int, dropout: float) -> None:
        super().__init__()
        self.weight = _uniform((num_gates * input_dim, num_experts), input_dim)
        self._num_gates = num_gates
        self.dropout = dropout
        self.mean_weights = None

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, gates, input_dim)``, or ``(batch, 1, input_dim)`` for the same to all gates; float32 or bfloat16.

        Returns:
            ``(batch, gates, experts)``, at least float32.
        """
        scores = torch.einsum("bgi,gie->bge", inputs, self.weight.view(self._num_gates, -1, self.weight.shape[1]))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.training and self.dropout:
            draws = torch.rand_like(scores)
            is_hidden = (draws < self.dropout) & (draws < draws.amax(dim=2, keepdim=True))
            scores = scores.masked_fill(is_hidden, -torch.inf)
        weights = scores.softmax(dim=2)
        if self.training:
            self.mean_weights = weights.detach().mean(dim=0)
        return weights


class Gated(Protocol):
    """A part of a model that weighs experts."""

    def gate_weights(self) -> dict[str, Tensor]:
        """Mean weight of each expert in the last training step, ``(experts,)`` by gate, on the device."""
        ...


def gate_gauges(model: nn.Module) -> dict[str, float]:
    """Mean weight of each expert at each gate of a model in the last training step, by name; waits for the device."""
    gauges: dict[str, float] = {}
    for part in model.modules():
        if hasattr(part, "gate_weights"):
            for gate, weights in cast("Gated", part).gate_weights().items():
                gauges |= {f"gate/{gate}/expert_{place}": weight for place, weight in enumerate(weights.tolist())}
    return gauges


def check_experts(key: str, config: MLPConfig) -> None:
    """Raises ConfigError unless experts have a layer: without one they would all be the same."""
    if not config.hidden:
        raise ConfigError(f"{key}.hidden", expected="at least one layer", received=config.hidden)


def _uniform(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    """Initial weights as ``nn.Linear`` draws them.

    The weights of all experts are kept as one matrix: the gradient of an axis of size 1 comes with strides that
    distributed training warns about.
    """
    return nn.Parameter(torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5))
