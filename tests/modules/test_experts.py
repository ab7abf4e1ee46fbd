"""Batched experts against one plain network after the other, and what gates hide."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlenv.modules.experts import ExpertGates, ExpertNetworks
from mlenv.modules.mlp import MLPConfig

GROUPS, EXPERTS, INPUT_DIM = 2, 3, 5


def plain_networks(networks: ExpertNetworks, config: MLPConfig) -> list[list[nn.Module]]:
    """The same weights in one MLP per expert."""
    plain = [[config.build(INPUT_DIM).double() for _ in range(EXPERTS)] for _ in range(GROUPS)]
    for group, expert, mlp in ((group, expert, plain[group][expert]) for group in range(GROUPS) for expert in range(EXPERTS)):
        linears = [layer for layer in mlp.layers if isinstance(layer, nn.Linear)]
        norms = [layer for layer in mlp.layers if isinstance(layer, (nn.BatchNorm1d, nn.LayerNorm))]
        with torch.no_grad():
            for place, linear in enumerate(linears):
                linear.weight.copy_(networks.weights[place].view(GROUPS, EXPERTS, linear.in_features, -1)[group, expert].T)
                linear.bias.copy_(networks.biases[place].view(GROUPS, EXPERTS, -1)[group, expert])
            for norm, own in zip(norms, networks.normalizations, strict=True):
                norm.weight.copy_(own.weight.view(GROUPS, EXPERTS, -1)[group, expert])
                norm.bias.copy_(own.bias.view(GROUPS, EXPERTS, -1)[group, expert])
    return plain


@pytest.mark.parametrize("normalization", ["none", "batch", "layer"])
@pytest.mark.parametrize("same_inputs", [False, True])
def test_experts_are_as_many_plain_networks(normalization, same_inputs):
    torch.manual_seed(0)
    config = MLPConfig(hidden=(4, 6), normalization=normalization)
    networks = ExpertNetworks(config, INPUT_DIM, EXPERTS, GROUPS).double()
    for norm in networks.normalizations:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    plain = plain_networks(networks, config)
    inputs = torch.randn(7, 1 if same_inputs else GROUPS, INPUT_DIM, dtype=torch.float64)
    for is_training in (True, False):  # the second pass needs the statistics of the first
        networks.train(is_training)
        result = networks(inputs)
        assert result.shape == (7, GROUPS, EXPERTS, 6)
        for group in range(GROUPS):
            for expert, mlp in enumerate(plain[group]):
                expected = mlp.train(is_training)(inputs[:, 0 if same_inputs else group])
                torch.testing.assert_close(result[:, group, expert], expected, atol=1e-6, rtol=0)


def test_weight_decay_spares_the_biases():
    networks = ExpertNetworks(MLPConfig(hidden=(4,), normalization="layer"), INPUT_DIM, EXPERTS)
    assert {name for name, parameter in networks.named_parameters() if parameter.ndim > 1} == {"weights.0"}


def test_initial_weights_spread_as_those_of_a_linear_layer():
    torch.manual_seed(0)
    networks = ExpertNetworks(MLPConfig(hidden=(100,)), 64, 10)
    for parameter in networks.parameters():
        assert 0.12 < parameter.abs().max() <= 0.125
        assert parameter.std().item() == pytest.approx(0.125 / 3**0.5, rel=0.05)


def test_gates_are_a_softmax_each():
    torch.manual_seed(0)
    gates = ExpertGates(INPUT_DIM, EXPERTS, 2, dropout=0.5).double().eval()
    inputs = torch.randn(4, 2, INPUT_DIM, dtype=torch.float64)
    weights = gates(inputs)
    for gate in range(2):
        torch.testing.assert_close(weights[:, gate], torch.softmax(inputs[:, gate] @ gates.weight.view(2, INPUT_DIM, EXPERTS)[gate], dim=1))
    assert gates.mean_weights is None  # only training is logged


@pytest.mark.parametrize("dropout", [0.3, 0.9])
def test_expert_dropout_hides_a_share_scales_up_the_rest_and_leaves_one(dropout):
    torch.manual_seed(0)
    gates = ExpertGates(INPUT_DIM, 4, 1, dropout).train()
    inputs = torch.randn(5000, 1, INPUT_DIM)
    hidden = gates(inputs)[:, 0]
    whole = gates.eval()(inputs)[:, 0]
    stays = hidden > 0
    kept = whole * stays
    torch.testing.assert_close(hidden, kept / kept.sum(1, keepdim=True))
    assert stays.any(1).all()
    # of 4 experts all are hidden with probability dropout^4, and then one of them stays all the same
    assert 1 - stays.float().mean().item() == pytest.approx(dropout - dropout**4 / 4, abs=0.01)
    torch.testing.assert_close(gates.mean_weights, hidden.mean(0, keepdim=True))
    assert not gates.mean_weights.requires_grad


def test_a_single_expert_is_never_hidden():
    gates = ExpertGates(INPUT_DIM, 1, 2, dropout=0.9).train()
    assert torch.equal(gates(torch.randn(50, 1, INPUT_DIM)), torch.ones(50, 2, 1))
