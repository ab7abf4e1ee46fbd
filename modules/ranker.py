"""The standard ranking model: representation -> crossing beside a deep network -> experts -> one head per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from mlenv.batch import Batch
from mlenv.errors import ConfigError, placed_under
from mlenv.kinds import kind_field
from mlenv.modules.cross_net import CrossNetConfig
from mlenv.modules.crossings import CROSSINGS, CrossingConfig
from mlenv.modules.embeddings import Embeddings
from mlenv.modules.entire_space_heads import EntireSpaceHeads
from mlenv.modules.feature_dropout import FeatureDropoutConfig
from mlenv.modules.heads import TaskHeads
from mlenv.modules.mlp import MLPConfig, check_dropout
from mlenv.modules.normalization import NumericNormalizationConfig
from mlenv.modules.representation import NUMBERS, SEQUENCES, NumbersConfig, Representation, SequenceConfig
from mlenv.modules.shared_bottom import SharedBottomConfig
from mlenv.modules.summaries import Summaries, SummaryConfig
from mlenv.schema import Schema


class ExpertsConfig(Protocol):
    """Builds a module ``(batch, input_dim) -> one (batch, output_dim) per task`` with an attribute ``output_dim``."""

    def build(self, input_dim: int, tasks: Sequence[str]) -> nn.Module: ...


EXPERTS: dict[str, type | str] = {
    "mmoe": "mlenv.modules.mmoe:MMoEConfig",
    "ple": "mlenv.modules.progressive_experts:ProgressiveExpertsConfig",
    "shared_bottom": SharedBottomConfig,
}
"""What tasks share, by the name that ``model.experts.kind`` takes."""


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """With the crossing ``cross_net`` this is DCN-V2 in its parallel form; without a crossing, a plain deep network."""

    sequences: dict[str, SequenceConfig] = kind_field(SEQUENCES, default_factory=dict)
    """Encoder of each sequence feature, by the feature's name; one that is not named is averaged."""
    numbers: NumbersConfig = kind_field(NUMBERS, default=NumericNormalizationConfig())
    """How numbers come to one scale."""
    feature_dropout: FeatureDropoutConfig | None = None
    """Features that training steps hide, and learned nulls for what is missing; without it an empty bag is zeros."""
    summaries: dict[str, SummaryConfig] = field(default_factory=dict)
    """Groups of features, by a name for each, that become one field before they are crossed."""
    crossing: CrossingConfig | None = kind_field(CROSSINGS, default=CrossNetConfig())
    """Explicit interactions of features, beside the deep network; null leaves them out."""
    deep: MLPConfig = field(default_factory=MLPConfig)
    """Implicit interactions."""
    experts: ExpertsConfig = kind_field(EXPERTS, default=SharedBottomConfig())
    """What the tasks share between the interactions and their heads."""
    heads: MLPConfig = field(default_factory=lambda: MLPConfig(hidden=(64,)))
    """Hidden layers of each task's own network."""
    entire_space: dict[str, str] = field(default_factory=dict)
    """ESMM: the earlier task that a task can only follow, such as ``conversion: click``; its label must not be masked by that task."""
    input_dropout: float = 0.0
    """Share of the representation that a training step hides."""

    def __post_init__(self) -> None:
        check_dropout("input_dropout", self.input_dropout)

    def build(self, schema: Schema, embeddings: Embeddings) -> Ranker:
        with placed_under("model"):
            return Ranker(self, schema, embeddings)


class Ranker(nn.Module):
    """Source: Wang et al., "DCN V2", WWW 2021, arXiv:2008.13535, section 3.4 (parallel structure)."""

    def __init__(self, config: RankerConfig, schema: Schema, embeddings: Embeddings) -> None:
        super().__init__()
        self.representation = Representation(schema, embeddings, config.sequences, config.numbers, config.feature_dropout)
        self.summaries, field_dims = None, self.representation.field_dims
        if config.summaries:
            with placed_under("summaries"):
                self.summaries = Summaries(config.summaries, self.representation.features, field_dims)
            field_dims = self.summaries.field_dims
        self.dropout = nn.Dropout(config.input_dropout)
        self.deep = config.deep.build(sum(field_dims))
        with placed_under("crossing"):
            self.crossing = None if config.crossing is None else config.crossing.build(field_dims)
        crossed_dim = 0 if self.crossing is None else int(self.crossing.output_dim)  # type: ignore[arg-type]
        with placed_under("experts"):
            self.experts = config.experts.build(self.deep.output_dim + crossed_dim, schema.tasks)
        heads = TaskHeads(config.heads, int(self.experts.output_dim), schema.tasks)  # type: ignore[arg-type]
        self.heads = EntireSpaceHeads(heads, schema.tasks, config.entire_space) if config.entire_space else heads
        for task, earlier in config.entire_space.items():
            if schema.labels[task].mask == (schema.labels[earlier].column or earlier):
                fix = f"set schema.labels.{task}.mask to '', so that it learns from all rows, or take the task out here"
                raise ConfigError(
                    f"entire_space.{task}", expected="a task whose label is not masked by the earlier one", received=earlier, fix=fix
                )

    def forward(self, batch: Batch) -> Tensor:
        """
        Returns:
            logits ``(batch, tasks)`` float32.
        """
        return self.dense_part(self.representation(batch))

    def dense_part(self, inputs: Tensor) -> Tensor:
        """What lies behind the embeddings; ``loop.compile`` puts a compiled one in its place.

        Args:
            inputs: ``(batch, representation.output_dim)``.

        Returns:
            logits ``(batch, tasks)`` float32.
        """
        if self.summaries is not None:
            inputs = self.summaries(inputs)
        inputs = self.dropout(inputs)
        outputs = self.deep(inputs)
        if self.crossing is not None:
            outputs = torch.cat([self.crossing(inputs), outputs], dim=1)
        logits: Tensor = self.heads(self.experts(outputs))
        return logits
