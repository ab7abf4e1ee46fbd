from __future__ import annotations

import pytest
import torch

from mlenv import compose, train
from mlenv.errors import ConfigError
from mlenv.modules.mlp import MLPConfig
from mlenv.modules.progressive_experts import ProgressiveExpertsConfig

TASKS = ("click", "buy", "like")
OWN, SHARED, WIDTH = 2, 3, 4
SMALL = ProgressiveExpertsConfig(num_layers=2, num_task_experts=OWN, num_shared_experts=SHARED, expert=MLPConfig(hidden=(WIDTH,)))


def run_expert(networks, index, inputs):
    weight, bias = networks.weights[0].view(-1, inputs.shape[1], WIDTH), networks.biases[0].view(-1, WIDTH)
    return torch.relu(inputs @ weight[index] + bias[index])


def mix(gate_weight, inputs, outputs):
    gate = torch.softmax(inputs @ gate_weight, dim=1)
    assert gate.shape[1] == len(outputs)
    return sum(gate[:, [place]] * output for place, output in enumerate(outputs))


def slow_ple(module, inputs):
    """Paths and experts one after the other, in lists."""
    by_task, shared = [inputs] * len(TASKS), inputs
    for layer in module.layers:
        of_task = [
            [run_expert(layer.task_experts, task * OWN + expert, by_task[task]) for expert in range(OWN)] for task in range(len(TASKS))
        ]
        of_shared = [run_expert(layer.shared_experts, expert, shared) for expert in range(SHARED)]
        mixed = [
            mix(layer.task_gates.weight.chunk(len(TASKS))[task], by_task[task], of_task[task] + of_shared) for task in range(len(TASKS))
        ]
        if layer is not module.layers[-1]:
            shared = mix(layer.shared_gate.weight, shared, [*(output for own in of_task for output in own), *of_shared])
        by_task = mixed
    return tuple(by_task)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return SMALL.build(5, TASKS)


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_it_is_what_the_paper_draws(batch, num_layers):
    torch.manual_seed(0)
    config = ProgressiveExpertsConfig(
        num_layers=num_layers, num_task_experts=OWN, num_shared_experts=SHARED, expert=MLPConfig(hidden=(WIDTH,))
    )
    module = config.build(5, TASKS).double()
    inputs = torch.randn(batch, 5, dtype=torch.float64)
    result = module(inputs)
    assert [output.shape for output in result] == [(batch, module.output_dim)] * 3
    for output, expected in zip(result, slow_ple(module, inputs), strict=True):
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)


def test_a_task_never_reaches_the_own_experts_of_another_in_the_last_layer(module):
    module(torch.randn(6, 5))[0].sum().backward()
    last = module.layers[-1].task_experts.weights[0].grad.chunk(len(TASKS))
    assert last[0].any()
    assert not any(grad.any() for grad in last[1:])
    assert module.layers[0].task_experts.weights[0].grad.chunk(len(TASKS))[1].any()  # through the shared path


def test_gate_weights_are_named_by_layer_and_path(module):
    assert module.gate_weights() == {}
    module(torch.randn(6, 5))
    counts = {name: len(weights) for name, weights in module.gate_weights().items()}
    assert counts == {
        **{f"0/{task}": OWN + SHARED for task in TASKS},
        "0/shared": len(TASKS) * OWN + SHARED,
        **{f"1/{task}": OWN + SHARED for task in TASKS},
    }
    for weights in module.gate_weights().values():
        assert weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_shared_experts": 0}, "num_shared_experts"),
        ({"num_task_experts": 0}, "num_task_experts"),
        ({"expert": MLPConfig(hidden=())}, "expert.hidden"),
        ({"expert_dropout": -0.1}, "expert_dropout"),
    ],
)
def test_options_that_cannot_work_are_refused(options, key):
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        ProgressiveExpertsConfig(**options)


@pytest.mark.parametrize("engine", ["torch", "torchrec"])
def test_a_ranker_with_it_trains(demo_arguments, engine):
    file, *overrides = demo_arguments(
        f"embeddings.engine={engine}", "model.experts.kind=ple", "model.experts.num_shared_experts=1", "loop.max_steps=3"
    )
    assert train(compose(file, overrides)).steps == 3
