from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mlenv.batch import Batch, SparseFeatures
from mlenv.config import DistillationConfig, HiddenDistillationConfig, ObjectiveConfig
from mlenv.errors import ConfigError
from mlenv.modules import Distillation, FocalLossConfig, Objective, Taught, UncertaintyConfig, pairwise_divergence, soft_label_divergence

NAN = float("nan")
NO_IDS = SparseFeatures((), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), ())


def batch_of(labels, weights=None, requests=None):
    labels = torch.tensor(labels)
    return Batch(
        NO_IDS,
        torch.zeros(len(labels), 0),
        labels,
        torch.ones_like(labels) if weights is None else torch.tensor(weights),
        requests=None if requests is None else torch.tensor(requests),
    )


def kl(q, p):
    return (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).item()


def test_soft_labels_are_the_divergence_of_both_probabilities():
    student, teacher = torch.tensor([[0.3], [-1.0], [2.0]]).double(), torch.tensor([[1.0], [0.5], [-3.0]]).double()
    weights = torch.tensor([[1.0], [3.0], [0.0]]).double()
    for temperature in (1.0, 4.0):
        terms = [
            kl(torch.sigmoid(t / temperature), torch.sigmoid(s / temperature)) for s, t in zip(student[:, 0], teacher[:, 0], strict=True)
        ]
        expected = temperature**2 * (terms[0] + 3 * terms[1]) / 4
        assert soft_label_divergence(student, teacher, weights, temperature, None).tolist() == pytest.approx([expected], abs=1e-9)


def test_its_gradient_is_that_of_the_cross_entropy_with_soft_labels():
    student = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ones = torch.ones_like(teacher)
    taught = torch.autograd.grad(soft_label_divergence(student, teacher, ones, 1.0, None).sum(), student)[0]
    plain = nn.functional.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none").mean(0).sum()
    torch.testing.assert_close(taught, torch.autograd.grad(plain, student)[0])
    assert torch.autograd.gradcheck(lambda logits: soft_label_divergence(logits, teacher, ones, 2.0, None), student)


def test_pairs_are_compared_inside_their_request():
    student, teacher = torch.tensor([0.1, 0.9, -0.4, 2.0, 0.3]).double(), torch.tensor([1.0, -1.0, 0.5, 0.0, 3.0]).double()
    weights, requests = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0]).double(), torch.tensor([7, 7, 7, 7, 9])
    total, norm = 0.0, 0.0
    for i in range(5):
        for j in range(i + 1, 5):
            weight = (weights[i] * weights[j]).item()
            if requests[i] == requests[j] and weight:
                total += weight * 4 * kl(torch.sigmoid((teacher[i] - teacher[j]) / 2), torch.sigmoid((student[i] - student[j]) / 2))
                norm += weight
    columns = [tensor.unsqueeze(1) for tensor in (student, teacher, weights)]
    assert pairwise_divergence(*columns, 2.0, requests).tolist() == pytest.approx([total / norm], abs=1e-9)
    shifted = (student + 5).unsqueeze(1)
    torch.testing.assert_close(pairwise_divergence(shifted, *columns[1:], 2.0, requests), pairwise_divergence(*columns, 2.0, requests))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: pairwise_divergence(logits.unsqueeze(1), *columns[1:], 2.0, requests), student)


def test_a_single_row_has_no_pair():
    logits = torch.tensor([[1.0]], requires_grad=True)
    loss = pairwise_divergence(logits, torch.zeros(1, 1), torch.ones(1, 1), 1.0, torch.tensor([3]))
    loss.sum().backward()
    assert loss.tolist() == [0.0]
    assert logits.grad.tolist() == [[0.0]]


def test_the_teacher_counts_where_it_has_something_to_say():
    objective = made(DistillationConfig(weight=2.0), [[1.0, NAN], [NAN, NAN], [0.0, NAN]])
    logits = torch.tensor([[0.2, 0.1], [0.3, 0.2], [0.0, 0.3]], requires_grad=True)
    batch = batch_of([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], weights=[[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    losses = objective(logits, batch)
    assert objective.terms == ("click/loss", "buy/loss", "click/distillation", "buy/distillation")
    only_row = kl(torch.sigmoid(torch.tensor(1.0)), torch.sigmoid(torch.tensor(0.2)))
    assert losses.terms[2:].tolist() == pytest.approx([only_row, 0.0], abs=1e-6)
    assert losses.weights.tolist() == [2.0, 3.0, 1.0, 0.0]
    torch.testing.assert_close(losses.tasks, losses.terms[:2] + 2 * losses.terms[2:])
    objective.backward(losses, lambda loss, **_: loss.backward())
    assert logits.grad.isfinite().all()


def test_rows_without_a_label_are_taught_when_asked():
    logits, batch = torch.tensor([[0.2], [0.3]]), batch_of([[1.0], [0.0]], weights=[[2.0], [0.0]])
    terms = [kl(torch.sigmoid(torch.tensor(taught)), torch.sigmoid(torch.tensor(said))) for taught, said in ((1.0, 0.2), (-1.0, 0.3))]
    for asked, expected in ((False, terms[0]), (True, (2 * terms[0] + terms[1]) / 3)):
        objective = made(DistillationConfig(unlabeled_rows=asked), [[1.0], [-1.0]], ("click",))
        assert objective(logits, batch).terms[1].item() == pytest.approx(expected, rel=1e-5)


def made(config, teacher_logits, tasks=("click", "buy"), num_steps=1, **options):
    taught = torch.tensor(teacher_logits)
    return Objective(
        ObjectiveConfig(distillation=config, **options),
        tasks,
        nn.Identity(),
        teach=lambda batch: Taught(taught),
        num_steps=num_steps,
        probe=batch_of([[0.0] * len(tasks)]),
    )


def test_the_weight_goes_in_a_straight_line_to_its_last_value_and_continues_there():
    logits, batch = torch.tensor([[0.0]]), batch_of([[1.0]])
    objective = made(DistillationConfig(weight=1.0, final_weight=0.0), [[2.0]], ("click",), num_steps=5)
    plain = objective(logits, batch).terms[0]

    def share(objective):
        losses = objective(logits, batch)
        return ((losses.tasks[0] - plain) / losses.terms[1]).item()

    objective.distillation.steps_done.zero_()
    assert [share(objective) for _ in range(6)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0], abs=1e-5)
    objective.distillation.steps_done.zero_()
    share(objective)
    resumed = made(DistillationConfig(weight=1.0, final_weight=0.0), [[2.0]], ("click",), num_steps=5)
    resumed.load_state_dict(objective.state_dict())
    assert share(resumed) == pytest.approx(0.75, abs=1e-5)


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.bottom, self.experts = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, batch):
        return self.experts(self.bottom(batch.dense))


def test_a_layer_is_drawn_towards_the_teachers_through_a_learnt_map():
    torch.manual_seed(0)
    student, target = Student(), torch.randn(6, 5)
    batch = replace(batch_of([[1.0]] * 6), dense=torch.randn(6, 3))
    config = DistillationConfig(teacher="somewhere", weight=0.0, hidden=HiddenDistillationConfig(weight=3.0))
    objective = Objective(
        ObjectiveConfig(distillation=config),
        ("click",),
        student,
        teach=lambda seen: Taught(torch.zeros(len(seen), 1), target[: len(seen)]),
        probe=replace(batch_of([[0.0]]), dense=torch.zeros(1, 3)),
    )
    assert objective.terms[-1] == "hidden_distillation"
    losses = objective(student(batch), batch)
    mapped = objective.distillation.hidden.projection(student.bottom(batch.dense))
    assert losses.terms[-1].item() == pytest.approx((mapped - target).square().mean().item(), rel=1e-6)
    torch.testing.assert_close(losses.tasks, losses.terms[:1] + 3 * losses.terms[-1:])
    objective.backward(losses, lambda loss, **_: loss.backward())
    assert objective.distillation.hidden.projection.weight.grad.abs().sum() > 0
    assert {name for name, _ in objective.named_parameters()} == {
        "distillation.hidden.projection.weight",
        "distillation.hidden.projection.bias",
    }
    broken = replace(config, hidden=HiddenDistillationConfig(student_part="expert"))
    with pytest.raises(ConfigError, match=r"objective\.distillation\.hidden\.student_part.*did you mean 'experts'"):
        Objective(ObjectiveConfig(distillation=broken), ("click",), student, teach=lambda seen: Taught(target), probe=batch)


def test_tasks_have_losses_of_their_own_beside_each_other():
    logits, batch = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), batch_of([[1.0, 0.0, 1.0]] * 5)
    tasks = ("click", "like", "buy")
    focal = FocalLossConfig(gamma=1.5)
    mixed = Objective(ObjectiveConfig(losses={"like": focal}, task_weights={"buy": 0.5}), tasks, nn.Identity())(logits, batch)
    plain = Objective(ObjectiveConfig(), tasks, nn.Identity())(logits, batch)
    all_focal = Objective(ObjectiveConfig(losses=dict.fromkeys(tasks, focal)), tasks, nn.Identity())(logits, batch)
    assert mixed.terms.tolist() == [plain.terms[0], all_focal.terms[1], plain.terms[2]]
    assert mixed.tasks.tolist() == [plain.terms[0], all_focal.terms[1], plain.terms[2] * 0.5]


def test_learnt_weights_are_parameters_and_gauges():
    objective = Objective(ObjectiveConfig(balance=UncertaintyConfig()), ("click", "buy"), nn.Identity())
    assert objective.gauges() == {"click/weight": 1.0, "buy/weight": 1.0}
    assert [name for name, _ in objective.named_parameters()] == ["balance.log_variances"]
    assert Objective(ObjectiveConfig(), ("click",), nn.Identity()).gauges() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"weight": -1.0}, "weight"),
        ({"final_weight": -1.0}, "final_weight"),
        ({"hidden": HiddenDistillationConfig()}, "hidden: expected null"),
        ({"calibrated": True}, "calibrated: expected false"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DistillationConfig(**options)


def test_it_is_a_module_of_its_own():
    distillation = Distillation(
        DistillationConfig(), ("click",), nn.Identity(), lambda batch: Taught(torch.ones(1, 1)), 1, batch_of([[0.0]])
    )
    assert distillation(torch.ones(1, 1), batch_of([[1.0]])).tasks.tolist() == pytest.approx([0.0], abs=1e-7)
