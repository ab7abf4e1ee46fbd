from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mlenv import compose, train
from mlenv.errors import ConfigError
from mlenv.loops.journal import Journal
from mlenv.modules import GradNormConfig, PCGradConfig, UncertaintyConfig
from mlenv.modules.task_balance import without_conflicts

TASKS = 2


class Shared(nn.Module):
    """A layer that two heads share."""

    def __init__(self):
        super().__init__()
        self.bottom, self.experts = nn.Linear(3, 4), nn.Linear(4, TASKS)

    def forward(self, inputs):
        return self.experts(torch.tanh(self.bottom(inputs)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Shared().double()


INPUTS = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def losses_of(model):
    logits = model(INPUTS)
    return torch.stack([logits[:, 0].square().mean(), (logits[:, 1] + 3).square().mean()])


def backward(loss, **options):
    loss.backward(**options)


def test_conflicts_are_projected_away():
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    # first + (second / 2) and second + first, each without its part against the other
    assert without_conflicts(torch.stack([first, second])).tolist() == [0.5, 1.5]
    assert without_conflicts(torch.stack([first, -second])).tolist() == [2.0, -1.0]
    assert without_conflicts(torch.stack([first, torch.zeros(2)])).tolist() == [1.0, 0.0]


def test_three_tasks_in_every_order_agree_with_the_algorithm_written_out():
    gradients = torch.randn(3, 4, generator=torch.Generator().manual_seed(3)).double()
    torch.manual_seed(5)
    orders = [torch.randperm(3).tolist() for _ in range(3)]
    expected = torch.zeros(4, dtype=torch.float64)
    for task, order in enumerate(orders):
        gradient = gradients[task].clone()
        for other in order:
            if other != task and (product := float(gradient @ gradients[other])) < 0:
                gradient -= product / float(gradients[other] @ gradients[other]) * gradients[other]
        expected += gradient
    torch.manual_seed(5)
    torch.testing.assert_close(without_conflicts(gradients), expected)


def test_surgery_touches_what_is_shared_and_leaves_the_heads(model):
    plain = copy.deepcopy(model)
    losses_of(plain).sum().backward()
    balance = PCGradConfig().build(TASKS, model)
    balance.backward(losses_of(model), backward)
    torch.testing.assert_close(model.experts.weight.grad, plain.experts.weight.grad)

    hidden = torch.tanh(model.bottom(INPUTS))
    leaf = hidden.detach().requires_grad_()
    logits = model.experts.forward(leaf)
    parts = [logits[:, 0].square().mean(), (logits[:, 1] + 3).square().mean()]
    gradients = torch.stack([torch.autograd.grad(part, leaf, retain_graph=True)[0] for part in parts])
    assert (gradients[0] * gradients[1]).sum() < 0, "this case is one of a conflict"
    expected = torch.autograd.grad(hidden, model.bottom.weight, without_conflicts(gradients))[0]
    torch.testing.assert_close(model.bottom.weight.grad, expected)
    assert not torch.allclose(model.bottom.weight.grad, plain.bottom.weight.grad)


def test_uncertainty_settles_where_a_task_weighs_half_the_inverse_of_its_loss():
    balance = UncertaintyConfig().build(TASKS, nn.Identity())
    assert balance.weights().tolist() == [1.0, 1.0]
    losses = torch.tensor([0.1, 2.0])
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.05)
    for _ in range(500):
        balance.backward(losses, backward)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(balance.weights(), 0.5 / losses, rtol=1e-3, atol=0)


def test_grad_norm_moves_weight_to_the_task_with_the_smaller_gradient(model):
    balance = GradNormConfig(asymmetry=0.0, learning_rate=0.1).build(TASKS, model).double()
    plain = copy.deepcopy(model)
    plain.experts._forward_pre_hooks.clear()
    losses_of(plain).sum().backward()
    balance.backward(losses_of(model), backward)
    torch.testing.assert_close(model.bottom.weight.grad, plain.bottom.weight.grad)  # all weights are 1 in the first step

    leaf = torch.tanh(model.bottom(INPUTS)).detach().requires_grad_()
    logits = model.experts.forward(leaf)
    parts = [logits[:, 0].square().mean(), (logits[:, 1] + 3).square().mean()]
    norms = torch.stack([torch.autograd.grad(part, leaf, retain_graph=True)[0].norm() for part in parts])
    norms = norms / norms.mean()
    moved = 1 - 0.1 * (norms - 1).sign() * norms
    torch.testing.assert_close(balance.weights(), moved * 2 / moved.sum())


def test_grad_norm_pushes_the_task_that_learns_slowly(model):
    balance = GradNormConfig(asymmetry=2.0).build(TASKS, model).double()
    balance.first_losses.copy_(torch.tensor([1.0, 1.0]))
    balance._update(torch.tensor([0.9, 0.1]).double(), torch.tensor([1.0, 1.0]).double())
    assert balance.weights()[0] > 1 > balance.weights()[1]


def test_grad_norm_waits_for_a_task_without_examples(model):
    balance = GradNormConfig().build(TASKS, model).double()
    balance._update(torch.tensor([0.5, 0.0]).double(), torch.tensor([1.0, 0.0]).double())
    assert balance.first_losses.tolist() == [0.5, 0.0]
    assert balance.weights().isfinite().all()


@pytest.mark.parametrize("config", [GradNormConfig(part="expert"), PCGradConfig(part="expert")])
def test_a_part_that_the_model_lacks_is_refused(model, config):
    with pytest.raises(ConfigError, match=r"part: expected the name of a part.*'expert'.*did you mean 'experts'"):
        config.build(TASKS, model)


@pytest.mark.parametrize(("key", "value"), [("asymmetry", -1), ("learning_rate", 0)])
def test_bad_values_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        GradNormConfig(**{key: value})


@pytest.mark.parametrize("engine", ["torch", "torchrec"])
@pytest.mark.parametrize("kind", ["uncertainty", "grad_norm", "pcgrad"])
def test_a_training_balances_its_tasks_and_continues_to_the_bit(demo_arguments, tmp_path, kind, engine):
    settings = [f"objective.balance.kind={kind}", f"embeddings.engine={engine}", "model.experts={kind: mmoe, num_experts: 2}"]
    for output, steps in (("whole", [8]), ("stopped", [5, 8])):
        for last in steps:
            options = [*settings, f"loop.max_steps={last}", "loop.learning_rate_decay=none", "loop.log_every_steps=2"]
            train(compose(*_split(demo_arguments(*options, output=output))))
    kept = ("click/loss", "click/weight", "gate/click/expert_0")
    whole, stopped = (
        [{key: line.get(f"train/{key}") for key in kept} for line in Journal(tmp_path / output / "metrics.jsonl").read()]
        for output in ("whole", "stopped")
    )
    assert whole[:4] == [line for line in stopped if line["click/loss"] is not None][:4]
    weights = [line["click/weight"] for line in whole[:4]]
    assert weights == [None] * 4 if kind == "pcgrad" else len(set(weights)) == 4


def _split(arguments):
    return arguments[0], arguments[1:]


class Around(nn.Module):
    """Parts that cannot be cut."""

    def __init__(self):
        super().__init__()
        self.bottom, self.deep, self.pair = nn.Linear(3, 4), nn.Linear(4, 2), nn.Bilinear(4, 4, 2)
        self.unused, self.listed = nn.Linear(2, 2), Listed()

    def forward(self, inputs):
        hidden = self.bottom(inputs)
        return self.deep(hidden) + self.pair(hidden, hidden) + self.listed([hidden])


class Listed(nn.Module):
    def forward(self, tensors):
        return tensors[0].sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("deep", "expected a part that nothing which it reads goes around"),
        ("listed", "expected a part of the model that reads one .* tensor. Received: 'listed, which reads list'"),
        ("unused", "expected a part that a forward pass of the model calls"),
    ],
)
def test_a_part_that_cannot_be_cut_is_refused(part, message):
    torch.manual_seed(0)
    model = Around()
    balance = PCGradConfig(part=part).build(TASKS, model)
    with pytest.raises(ConfigError, match=rf"objective\.balance\.part: {message}"):
        balance.backward(model(torch.randn(5, 3)).square().mean(0), backward)


def test_uncertainty_leaves_a_task_without_examples_alone():
    balance = UncertaintyConfig().build(TASKS, nn.Identity())
    balance.backward(torch.tensor([1.0, 0.0], requires_grad=True), backward)
    assert balance.log_variances.grad.tolist() == [-0.5, 0.0]
