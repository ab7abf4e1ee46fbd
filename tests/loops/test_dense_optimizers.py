from __future__ import annotations

import pytest
import torch
from torch import nn

from mlenv.errors import ConfigError
from mlenv.loops.dense_optimizers import AdamConfig, AdamWConfig, SGDConfig
from mlenv.loops.lion import LionConfig

DECAY = 0.3


def adamw(config, weight, gradient, state, decay):
    weight = weight * (1 - config.learning_rate * decay)
    return adam(config, weight, gradient, state, 0.0)


def adam(config, weight, gradient, state, decay):
    gradient = gradient + decay * weight
    step, first, second = state or (0, 0.0, 0.0)
    step += 1
    first = config.beta1 * first + (1 - config.beta1) * gradient
    second = config.beta2 * second + (1 - config.beta2) * gradient**2
    rate = config.learning_rate / (1 - config.beta1**step)
    return weight - rate * first / ((second / (1 - config.beta2**step)) ** 0.5 + config.eps), (step, first, second)


def lion(config, weight, gradient, state, decay):
    momentum = state or 0.0
    direction = config.beta1 * momentum + (1 - config.beta1) * gradient
    sign = (direction > 0) - (direction < 0)
    return weight - config.learning_rate * (sign + decay * weight), config.beta2 * momentum + (1 - config.beta2) * gradient


def sgd(config, weight, gradient, state, decay):
    momentum = config.momentum * (state or 0.0) + gradient + decay * weight
    return weight - config.learning_rate * momentum, momentum


EVERY_KIND = pytest.mark.parametrize(
    ("config", "update", "state"),
    [
        (AdamWConfig(learning_rate=0.1, weight_decay=DECAY, beta1=0.8, beta2=0.99, eps=1e-3), adamw, {"step", "exp_avg", "exp_avg_sq"}),
        (AdamConfig(learning_rate=0.1, weight_decay=DECAY, beta1=0.8, beta2=0.99, eps=1e-3), adam, {"step", "exp_avg", "exp_avg_sq"}),
        (LionConfig(learning_rate=0.1, weight_decay=DECAY, beta1=0.8, beta2=0.95), lion, {"exp_avg"}),
        (SGDConfig(learning_rate=0.1, weight_decay=DECAY, momentum=0.7), sgd, {"momentum_buffer"}),
        (SGDConfig(learning_rate=0.1, weight_decay=DECAY, momentum=0.0), sgd, set()),
    ],
    ids=["adamw", "adam", "lion", "sgd", "sgd without momentum"],
)


@EVERY_KIND
def test_each_kind_is_what_is_written_out_number_by_number(config, update, state):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(2, 3, generator=generator)), nn.Parameter(torch.randn(3, generator=generator))]
    numbers = [[(weight, None) for weight in parameter.flatten().tolist()] for parameter in parameters]
    optimizer = config.build(iter(parameters))
    for _ in range(5):
        for place, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            decay = DECAY if parameter.ndim > 1 else 0.0
            gradients = parameter.grad.flatten().tolist()
            numbers[place] = [
                update(config, *pair[:1], slope, pair[1], decay) for pair, slope in zip(numbers[place], gradients, strict=True)
            ]
        optimizer.step()
    for parameter, pairs in zip(parameters, numbers, strict=True):
        torch.testing.assert_close(parameter.detach().flatten(), torch.tensor([weight for weight, _ in pairs]), rtol=1e-5, atol=1e-6)
    assert all(set(optimizer.state[parameter]) == state for parameter in parameters if state)


@EVERY_KIND
def test_the_state_is_there_before_the_first_step_and_is_updated_in_place(config, update, state):
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = config.build([parameter])
    before = dict(optimizer.state[parameter])
    assert set(before) == state
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    assert all(optimizer.state[parameter][name] is tensor for name, tensor in before.items())


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (AdamWConfig, {"learning_rate": 0}, "learning_rate: expected a number > 0"),
        (AdamConfig, {"weight_decay": -1}, "weight_decay: expected a number >= 0"),
        (AdamConfig, {"eps": -1}, "eps: expected a number >= 0"),
        (LionConfig, {"beta2": 1.0}, r"beta2: expected a number in \[0, 1\)"),
        (SGDConfig, {"momentum": 1.0}, r"momentum: expected a number in \[0, 1\)"),
        (SGDConfig, {"gradient_clip_norm": -1}, "gradient_clip_norm: expected a number >= 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(config, options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)
