from __future__ import annotations

from itertools import combinations

import pytest
import torch

from mlenv.errors import ConfigError
from mlenv.modules.factorization_machine import FactorizationMachineConfig


@pytest.mark.parametrize("field_dims", [(3, 3, 3, 3), (3, 1, 2, 1)])
def test_sums_the_products_of_all_pairs(field_dims):
    torch.manual_seed(0)
    scalar = FactorizationMachineConfig(token_dim=3).build(field_dims).double()
    vector = FactorizationMachineConfig(token_dim=3, output="vector").build(field_dims).double()
    vector.tokens.load_state_dict(scalar.tokens.state_dict())
    inputs = torch.randn(5, sum(field_dims), dtype=torch.float64)
    pairs = torch.stack([sum(first * second for first, second in combinations(tokens, 2)) for tokens in vector.tokens(inputs)])
    torch.testing.assert_close(vector(inputs), pairs, rtol=1e-6, atol=1e-6)
    first_order = inputs @ scalar.first_order.weight[0]
    torch.testing.assert_close(scalar(inputs), (first_order + pairs.sum(1)).unsqueeze(1), rtol=1e-6, atol=1e-6)
    assert (scalar.output_dim, vector.output_dim) == (1, 3)


@pytest.mark.parametrize("output", ["scalar", "vector"])
def test_the_gradient_is_that_of_the_sum_of_the_products(output):
    torch.manual_seed(0)
    machine = FactorizationMachineConfig(token_dim=3, output=output).build((3, 1, 3, 2)).double()
    inputs = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(machine, inputs)
    assert torch.autograd.gradgradcheck(machine, inputs)
    pairs = sum(first * second for first, second in combinations(machine.tokens(inputs).unbind(1), 2))
    expected = pairs if output == "vector" else machine.first_order(inputs) + pairs.sum(1, keepdim=True)
    (slow,) = torch.autograd.grad(expected.square().sum(), inputs)
    (gradient,) = torch.autograd.grad(machine(inputs).square().sum(), inputs)
    torch.testing.assert_close(gradient, slow)


def test_by_hand():
    machine = FactorizationMachineConfig(token_dim=2).build((2, 2, 2))
    torch.nn.init.ones_(machine.first_order.weight)
    assert machine(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])).tolist() == [[21 + 11 + 17 + 39]]


def test_bad_values_are_refused():
    with pytest.raises(ConfigError, match=r"^token_dim: "):
        FactorizationMachineConfig(token_dim=0)
