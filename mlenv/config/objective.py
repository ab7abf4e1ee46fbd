"""What a training lowers: ``objective`` of a config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from mlenv.errors import ConfigError, check_above, check_at_least
from mlenv.kinds import kind_field

if TYPE_CHECKING:
    from torch import nn


class LossConfig(Protocol):
    """Builds a module ``(logits, labels, weights, requests) -> (tasks,)``, the mean loss of each task over what counts.

    ``logits``, ``labels`` in [0, 1] and ``weights`` >= 0 are ``(batch, tasks)`` float32; ``requests`` is ``(batch,)`` int64
    as in ``Batch``, or None where ``reads_requests`` is False. A weight of 0 hides an example from a task; a row of weight 2
    counts as two rows. A task for which nothing counts has the loss 0 and no gradient.
    """

    reads_requests: ClassVar[bool]

    def build(self) -> nn.Module: ...


LOSSES: dict[str, type | str] = {
    "binary_cross_entropy": "mlenv.modules.pointwise_losses:BinaryCrossEntropyConfig",
    "fake_negative_weighted": "mlenv.modules.delayed_feedback:FakeNegativeWeightedConfig",
    "focal": "mlenv.modules.pointwise_losses:FocalLossConfig",
    "generalized_cross_entropy": "mlenv.modules.noise_robust_losses:GeneralizedCrossEntropyConfig",
    "listwise": "mlenv.modules.request_losses:ListwiseLossConfig",
    "pairwise": "mlenv.modules.request_losses:PairwiseLossConfig",
    "symmetric_cross_entropy": "mlenv.modules.noise_robust_losses:SymmetricCrossEntropyConfig",
}
"""Losses by the name that ``objective.losses.TASK.kind`` takes."""


class BalanceConfig(Protocol):
    """Builds what weighs the losses of the tasks against each other; see ``mlenv.modules.task_balance``."""

    def build(self, num_tasks: int, model: nn.Module) -> nn.Module: ...


BALANCES: dict[str, type | str] = {
    "grad_norm": "mlenv.modules.task_balance:GradNormConfig",
    "pcgrad": "mlenv.modules.task_balance:PCGradConfig",
    "uncertainty": "mlenv.modules.task_balance:UncertaintyConfig",
}
"""Balances by the name that ``objective.balance.kind`` takes."""


@dataclass(frozen=True, kw_only=True)
class HiddenDistillationConfig:
    """Draws a layer of the student towards a layer of the teacher, through a linear map that is learnt and thrown away."""

    weight: float = 1.0
    """Of this term beside the other losses."""
    student_part: str = "experts"
    """Part of the student whose input is drawn."""
    teacher_part: str = "experts"
    """Part of the teacher towards whose input it is drawn."""

    def __post_init__(self) -> None:
        check_above("weight", self.weight, 0)


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What a teacher adds to the losses: the student learns its predictions beside the labels."""

    teacher: str = ""
    """Who teaches: the output folder or a checkpoint of a training, or a model that MLflow keeps (``runs:/RUN/model``,
    ``models:/NAME@ALIAS``). Empty for predictions in the columns that ``schema.labels.TASK.teacher`` names."""
    loss: Literal["soft_labels", "pairwise"] = "soft_labels"
    """soft_labels learns the teacher's probabilities; pairwise its order of the rows of a request, and how sure it is of it."""
    temperature: float = 1.0
    """Logits of both are divided by it; above 1 shows more of what the teacher holds for unlikely."""
    weight: float = 1.0
    """Of the teacher's term beside the loss of the labels, which keeps the weight 1."""
    final_weight: float | None = None
    """Weight at the last step, reached in a straight line; null keeps it constant."""
    unlabeled_rows: bool = False
    """Learn from the teacher also where the label is hidden, such as on rows that were made up to be taught on."""
    hidden: HiddenDistillationConfig | None = None
    """Learns from an inner layer of the teacher as well; needs a teacher that is a model."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """What the teacher computes in."""
    calibrated: bool = False
    """Learn the teacher's calibrated predictions. Its logits teach more: calibrators flatten what they cannot tell apart, were
    fitted on days that the student may be measured on, and the labels give the student its level anyway."""

    def __post_init__(self) -> None:
        check_above("temperature", self.temperature, 0)
        for name, value in (("weight", self.weight), ("final_weight", self.final_weight)):
            if value is not None:
                check_at_least(name, value, 0)
        if self.hidden is not None and not self.teacher:
            fix = "name a checkpoint in teacher, or set hidden to null"
            raise ConfigError("hidden", expected="null, because columns hold no inner layers", received="a layer", fix=fix)
        if self.calibrated and not self.teacher:
            raise ConfigError("calibrated", expected="false, because columns are taken as they are", received=True)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the training lowers: a loss per task, a mean over the examples that count; by default their sum."""

    losses: dict[str, LossConfig] = kind_field(LOSSES, default_factory=dict)
    """Loss of a task; binary cross-entropy for a task that is not named."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """Weight of a task in the sum; 1 for a task that is not named."""
    balance: BalanceConfig | None = kind_field(BALANCES, default=None)
    """What weighs the tasks against each other while they are learnt, beside the fixed weights; null adds them up."""
    distillation: DistillationConfig | None = None
    """A teacher; null learns from the labels alone."""

    def __post_init__(self) -> None:
        for task, weight in self.task_weights.items():
            check_at_least(f"task_weights.{task}", weight, 0)

    @property
    def reads_requests(self) -> bool:
        """Whether a loss compares the rows of a request."""
        pairs = self.distillation is not None and self.distillation.loss == "pairwise"
        return pairs or any(loss.reads_requests for loss in self.losses.values())

    @property
    def reads_teacher_columns(self) -> bool:
        """Whether the teacher's predictions come with the rows."""
        return self.distillation is not None and not self.distillation.teacher
