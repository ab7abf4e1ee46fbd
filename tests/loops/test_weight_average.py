from __future__ import annotations

import pytest
import torch
from torch import nn

from mlenv.loops.weight_average import WeightAverage


def test_the_average_is_the_sum_that_is_written_out_number_by_number():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    average = WeightAverage({"weight": weight}, decay=0.6)
    expected = weight.tolist()
    for step in range(8):
        with torch.no_grad():
            weight += torch.tensor([0.5, 3.0]) * (-1) ** step
        average.follow(step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, weight.tolist(), strict=True)]
        assert average.tensors()["weight"].tolist() == pytest.approx(expected)
    assert (1 + step) / (10 + step) < 0.6 < (1 + 20) / (10 + 20)


def test_the_decay_ends_at_its_limit():
    weight = nn.Parameter(torch.tensor([0.0]))
    average = WeightAverage({"weight": weight}, decay=0.5)
    with torch.no_grad():
        weight += 1
    average.follow(1000)
    assert average.tensors()["weight"].tolist() == [0.5]


def test_the_model_has_the_average_for_a_while_and_its_own_weights_again_even_after_an_error():
    linear = nn.Linear(2, 1)
    average = WeightAverage(dict(linear.named_parameters()), decay=0.9)
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    with torch.no_grad():
        linear.weight += 1
    own = {name: tensor.clone() for name, tensor in linear.state_dict().items()}

    def fail_inside():
        with average.in_place():
            assert all(torch.equal(tensor, before[name]) for name, tensor in linear.state_dict().items())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert all(torch.equal(tensor, own[name]) for name, tensor in linear.state_dict().items())
    tensors = average.tensors()
    assert set(tensors) == {"weight", "bias", "trained.weight", "trained.bias"}
    assert torch.equal(tensors["trained.weight"], linear.weight)
    assert torch.equal(tensors["weight"], before["weight"])
