"""The model: from a batch to one logit for each task. config.yaml names TowerConfig by its import path."""

from __future__ import annotations

from dataclasses import dataclass

from mlenv import Schema
from mlenv.modules import Embeddings, MLPConfig, Representation, SharedBottom, TaskHeads
from torch import nn


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """One tower over all features, and a head for each task."""

    hidden: tuple[int, ...] = (64, 32)
    """Widths of the tower's layers."""

    def build(self, schema: Schema, embeddings: Embeddings) -> nn.Module:
        representation = Representation(schema, embeddings)
        tower = MLPConfig(hidden=self.hidden).build(representation.output_dim)
        shared = SharedBottom(tower.output_dim, schema.tasks)
        heads = TaskHeads(MLPConfig(hidden=()), shared.output_dim, schema.tasks)
        return nn.Sequential(representation, tower, shared, heads)  # a Batch in, logits (batch, tasks) out
