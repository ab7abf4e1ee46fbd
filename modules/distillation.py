"""Learning from a teacher: its predictions, and its inner layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlenv.batch import Batch
from mlenv.config import DistillationConfig, HiddenDistillationConfig
from mlenv.modules.losses import weighted_mean
from mlenv.modules.request_losses import number_requests, request_pairs
from mlenv.modules.shared_input import WatchedInput


@dataclass(frozen=True)
class Taught:
    """What a teacher says about one batch."""

    logits: Tensor
    """``(batch, tasks)`` float32, in the student's order of tasks; NaN where the teacher has nothing to say."""
    hidden: Tensor | None = None
    """``(batch, hidden_dim)``, the inner layer that the student is drawn towards."""


Teach = Callable[[Batch], Taught]


@dataclass(frozen=True)
class TaughtLosses:
    """What a teacher adds to the losses of a step."""

    tasks: Tensor
    """``(tasks,)`` float32, with its graph, weighted."""
    terms: Tensor
    """``(terms,)`` float32, without a graph and without the weight."""
    weights: Tensor
    """``(terms,)`` float32, sum of the weights that each term is a mean over."""


class Distillation(nn.Module):
    """Adds to each task's loss how far the student is from the teacher, with a weight that may follow the steps.

    A row counts for a task with the weight that its label has (with ``unlabeled_rows``, 1 where that is 0), and not at all
    where the teacher has no prediction. The distance of the inner layers, which belongs to no task, is shared out among
    them evenly. What the teacher adds to a task is multiplied by the task's weights, as its own loss is.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2.
    """

    steps_done: Tensor

    def __init__(
        self, config: DistillationConfig, tasks: Sequence[str], model: nn.Module, teach: Teach, num_steps: int, probe: Batch
    ) -> None:
        super().__init__()
        self._config, self._teach, self._num_steps = config, teach, num_steps
        self._distance = pairwise_divergence if config.loss == "pairwise" else soft_label_divergence
        self.hidden = None if config.hidden is None else HiddenDistillation(config.hidden, model, teach, probe)
        self.terms = tuple(f"{task}/distillation" for task in tasks) + (("hidden_distillation",) if self.hidden is not None else ())
        """Names of what is shown."""
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))

    def forward(self, logits: Tensor, batch: Batch) -> TaughtLosses:
        """
        Args:
            logits: the student's, ``(batch, tasks)`` float32.
            batch: the examples that they belong to.
        """
        taught = self._teach(batch)
        is_taught = ~taught.logits.isnan()
        counted = torch.where(batch.weights > 0, batch.weights, 1.0) if self._config.unlabeled_rows else batch.weights
        weights = counted * is_taught
        teacher_logits = torch.where(is_taught, taught.logits, 0.0)
        losses = self._distance(logits, teacher_logits, weights, self._config.temperature, batch.requests)
        terms, sums, tasks = [losses.detach()], [weights.sum(0)], losses * self._weight()
        if self.hidden is not None:
            assert taught.hidden is not None
            distance = self.hidden(taught.hidden)
            tasks = tasks + self.hidden.weight * distance / len(losses)
            terms, sums = [*terms, distance.detach().view(1)], [*sums, weights.new_full((1,), len(batch))]
        return TaughtLosses(tasks, torch.cat(terms), torch.cat(sums))

    def _weight(self) -> Tensor | float:
        """The weight of this step; counts the step."""
        start, end = self._config.weight, self._config.final_weight
        if end is None:
            return start
        share = self.steps_done / max(self._num_steps - 1, 1)
        if self.training:
            self.steps_done += 1
        return start + (end - start) * share.clamp(max=1.0)


class HiddenDistillation(nn.Module):
    """Mean squared distance between a layer of the teacher and a linear map of a layer of the student.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv:1412.6550, section 2.2.
    """

    def __init__(self, config: HiddenDistillationConfig, student: nn.Module, teach: Teach, probe: Batch) -> None:
        super().__init__()
        self.weight = config.weight
        self._watched = WatchedInput(student, config.student_part, "objective.distillation.hidden.student_part")
        was_training = student.training
        with torch.no_grad():
            student.eval()(probe)
        student.train(was_training)
        taught = teach(probe).hidden
        assert taught is not None
        self.projection = nn.Linear(self._watched.take().shape[1], taught.shape[1])

    def forward(self, hidden: Tensor) -> Tensor:
        """
        Args:
            hidden: ``(batch, hidden_dim)`` of the teacher, for the batch that the student saw last.

        Returns:
            a scalar, float32.
        """
        projected = self.projection(self._watched.take().float())
        return functional.mse_loss(projected, hidden.float())


def soft_label_divergence(logits: Tensor, teacher_logits: Tensor, weights: Tensor, temperature: float, requests: Tensor | None) -> Tensor:
    """Mean over the examples of ``T^2 KL(sigmoid(teacher / T) || sigmoid(student / T))``.

    Its gradient is that of the cross-entropy with soft labels; its value is 0 where the student agrees. ``T^2`` keeps the
    size of the gradient when the temperature changes.

    Args:
        logits, teacher_logits: ``(batch, tasks)`` float32.
        weights: ``(batch, tasks)`` float32, >= 0.
        requests: not read.

    Returns:
        ``(tasks,)`` float32; 0 for a task that no example counts for.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2.
    """
    return weighted_mean(_divergence(logits, teacher_logits, temperature), weights)


def pairwise_divergence(logits: Tensor, teacher_logits: Tensor, weights: Tensor, temperature: float, requests: Tensor | None) -> Tensor:
    """Mean over the pairs of rows of a request of how differently teacher and student rank them.

    The divergence is that of ``soft_label_divergence`` between the chances that the first of a pair ranks above the second,
    ``sigmoid((logit[i] - logit[j]) / T)``. A level that only the teacher has does not matter. A pair weighs the product of the
    weights of its rows.

    Args:
        logits, teacher_logits: ``(batch, tasks)`` float32.
        weights: ``(batch, tasks)`` float32, >= 0.
        requests: ``(batch,)`` int64, as in ``Batch``.

    Returns:
        ``(tasks,)`` float32; 0 for a task without a pair.

    Source: the chances are those of Burges et al., "Learning to Rank using Gradient Descent", ICML 2005, equations 1 to 3,
    with the teacher in the place of the judge.
    """
    counts = (weights > 0).any(1)
    first, second = request_pairs(number_requests(requests), counts, counts)
    first, second = (rows[first < second] for rows in (first, second))  # each pair once, and no row with itself

    def gaps(values: Tensor) -> Tensor:
        return values.index_select(0, first) - values.index_select(0, second)

    return weighted_mean(_divergence(gaps(logits), gaps(teacher_logits), temperature), weights[first] * weights[second])


def _divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    student, teacher = logits / temperature, teacher_logits / temperature
    taught = torch.sigmoid(teacher)
    cross_entropy = functional.binary_cross_entropy_with_logits(student, taught, reduction="none")
    entropy = functional.binary_cross_entropy_with_logits(teacher, taught, reduction="none")
    return temperature**2 * (cross_entropy - entropy)
