from __future__ import annotations

import pytest
import torch

from mlenv import compose, train
from mlenv.errors import ConfigError
from mlenv.modules.mlp import MLPConfig
from mlenv.modules.mmoe import MMoEConfig

TASKS = ("click", "buy")
SMALL = MMoEConfig(num_experts=3, expert=MLPConfig(hidden=(4, 3)))


def slow_mmoe(module, inputs):
    """Each example, task and expert by itself."""
    rows = []
    for x in inputs:
        for task in range(len(TASKS)):
            scores = torch.stack([x @ module.gates.weight.view(2, 5, 3)[task, :, expert] for expert in range(3)]).exp()
            mixed = torch.zeros(3, dtype=x.dtype)
            for expert in range(3):
                outputs = x
                for weight, bias in zip(module.experts.weights, module.experts.biases, strict=True):
                    outputs = torch.relu(outputs @ weight.view(3, len(outputs), -1)[expert] + bias.view(3, -1)[expert])
                mixed = mixed + scores[expert] / scores.sum() * outputs
            rows.append(mixed)
    return torch.stack(rows).view(len(inputs), len(TASKS), 3)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return SMALL.build(5, TASKS)


@pytest.mark.parametrize("batch", [1, 6])
def test_it_is_the_sum_over_experts_that_the_paper_writes(module, batch):
    inputs = torch.randn(batch, 5, dtype=torch.float64)
    result = module.double()(inputs)
    assert [output.shape for output in result] == [(batch, module.output_dim)] * 2
    torch.testing.assert_close(torch.stack(result, dim=1), slow_mmoe(module, inputs), atol=1e-6, rtol=0)


def test_gate_weights_are_the_mean_of_the_last_training_step(module):
    assert module.gate_weights() == {}
    inputs = torch.randn(6, 5)
    module(inputs)
    weights = module.gate_weights()
    assert list(weights) == list(TASKS)
    for task, name in enumerate(TASKS):
        torch.testing.assert_close(weights[name], torch.softmax(inputs @ module.gates.weight.view(2, 5, 3)[task], dim=1).mean(0))
    module.eval()(torch.randn(6, 5))
    assert all(torch.equal(weights[name], kept) for name, kept in module.gate_weights().items())
    assert not any("mean_weights" in name for name in module.state_dict())


def test_compile_has_no_graph_break_in_training():
    torch.manual_seed(0)
    module = MMoEConfig(num_experts=3, expert=MLPConfig(hidden=(4,)), expert_dropout=0.3).build(5, TASKS)
    outputs = torch.compile(module, backend="aot_eager", fullgraph=True)(torch.randn(6, 5))
    torch.stack(outputs).sum().backward()
    assert module.gate_weights()["buy"].sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"expert": MLPConfig(hidden=())}, "expert.hidden"),
        ({"expert_dropout": 1.0}, "expert_dropout"),
    ],
)
def test_options_that_cannot_work_are_refused(options, key):
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        MMoEConfig(**options)


@pytest.mark.parametrize("engine", ["torch", "torchrec"])
def test_a_ranker_with_it_trains(demo_arguments, engine):
    file, *overrides = demo_arguments(
        f"embeddings.engine={engine}", "model.experts.kind=mmoe", "model.experts.expert_dropout=0.1", "loop.max_steps=3"
    )
    assert train(compose(file, overrides)).steps == 3
