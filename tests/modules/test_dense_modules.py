"""The small dense modules, against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mlenv.errors import ConfigError
from mlenv.modules import CrossNet, CrossNetConfig, MLPConfig, TaskHeads, weighted_binary_cross_entropy
from mlenv.modules.embeddings import EmbeddedSequence
from mlenv.modules.field_tokens import FieldTokens
from mlenv.modules.mean_pooling import MeanPoolingConfig
from mlenv.modules.shared_bottom import SharedBottomConfig


def test_cross_net_multiplies_the_input_with_itself():
    net = CrossNet(CrossNetConfig(num_layers=2), 2)
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
            layer.bias.copy_(torch.tensor([0.5, 0.0]))
    x0 = (2.0, 3.0)
    x1 = (x0[0] * (2 + 3 + 0.5) + x0[0], x0[1] * (2 * 3) + x0[1])
    x2 = (x0[0] * (x1[0] + x1[1] + 0.5) + x1[0], x0[1] * (2 * x1[1]) + x1[1])
    assert net(torch.tensor([x0])).tolist() == [list(x2)]


def test_mlp_shapes_and_layers():
    mlp = MLPConfig(hidden=(4, 2), dropout=0.5, normalization="layer").build(3)
    assert [type(layer).__name__ for layer in mlp.layers] == ["Linear", "LayerNorm", "ReLU", "Dropout"] * 2
    assert mlp(torch.randn(1, 3)).shape == (1, 2)
    passes = MLPConfig(hidden=()).build(3)
    assert passes.output_dim == 3
    inputs = torch.randn(2, 3)
    assert torch.equal(passes(inputs), inputs)


def test_heads_give_one_column_per_task_in_order():
    heads = TaskHeads(MLPConfig(hidden=()), 2, ("click", "buy"))
    with torch.no_grad():
        for bias, (_, head) in enumerate(heads.heads.items()):
            head[1].weight.fill_(1.0)
            head[1].bias.fill_(float(bias))
    shared = SharedBottomConfig().build(2, ("click", "buy"))
    assert shared.output_dim == 2
    assert heads(shared(torch.tensor([[1.0, 2.0]]))).tolist() == [[3.0, 4.0]]
    assert heads([torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 5.0]])]).tolist() == [[3.0, 11.0]]


def test_the_loss_is_a_weighted_mean_per_task():
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weights = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    first = (math.log(2) + 3 * math.log(1 + math.exp(2))) / 4
    losses = weighted_binary_cross_entropy(logits, labels, weights)
    assert losses[0].item() == pytest.approx(first, rel=1e-6)
    assert losses[1].item() == 0  # no example counts


def test_mean_pooling_gives_the_mean_and_how_many_there_were():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    pooling = MeanPoolingConfig().build(2, 0)
    pooled = pooling(EmbeddedSequence(values, torch.tensor([2, 0, 1], dtype=torch.int32)), torch.zeros(3, 0))
    torch.testing.assert_close(pooled, torch.tensor([[2, 3, math.log(3)], [0, 0, 0], [9, 9, math.log(2)]]))
    assert pooling.output_dim == 3
    nothing = EmbeddedSequence(torch.zeros(0, 2), torch.zeros(3, dtype=torch.int32))
    assert pooling(nothing, torch.zeros(3, 0)).tolist() == [[0, 0, 0]] * 3


def test_field_tokens_are_a_view_or_a_map_per_field():
    inputs = torch.arange(12.0).view(2, 6)
    tokens = FieldTokens((2, 2, 2), 2)
    assert not list(tokens.parameters())
    assert torch.equal(tokens(inputs), inputs.view(2, 3, 2))
    mixed = FieldTokens((2, 2, 1, 1), 3)
    result = mixed(inputs)
    assert result.shape == (2, 4, 3)
    weights, biases = [*mixed.weights[0].chunk(2), *mixed.weights[1].chunk(2)], [*mixed.biases[0].view(2, 3), *mixed.biases[1].view(2, 3)]
    for place, field in enumerate(inputs.split([2, 2, 1, 1], dim=1)):
        torch.testing.assert_close(result[:, place], field @ weights[place] + biases[place])


@pytest.mark.parametrize(
    "build",
    [
        lambda: CrossNetConfig(num_layers=0),
        lambda: MLPConfig(hidden=(8, 0)),
        lambda: MLPConfig(dropout=1.0),
    ],
)
def test_options_that_cannot_work_are_refused(build):
    with pytest.raises(ConfigError):
        build()
