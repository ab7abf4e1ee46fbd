"""What a feature crossing is, and the table to choose one from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from mlenv.errors import ConfigError


class CrossingConfig(Protocol):
    """Builds a module ``(batch, sum of field_dims) -> (batch, output_dim)`` with an attribute ``output_dim``."""

    def build(self, field_dims: Sequence[int]) -> nn.Module: ...


CROSSINGS: dict[str, type | str] = {
    "autoint": "mlenv.modules.field_attention:AutoIntConfig",
    "cross_net": "mlenv.modules.cross_net:CrossNetConfig",
    "dot": "mlenv.modules.dot_interaction:DotInteractionConfig",
    "ensemble": "mlenv.modules.crossing_stack:CrossingEnsembleConfig",
    "final_mlp": "mlenv.modules.final_mlp:FinalMLPConfig",
    "fm": "mlenv.modules.factorization_machine:FactorizationMachineConfig",
    "gated_cross_net": "mlenv.modules.gated_cross_net:GatedCrossNetConfig",
    "low_rank_cross_net": "mlenv.modules.low_rank_cross_net:LowRankCrossNetConfig",
    "masknet": "mlenv.modules.masknet:MaskNetConfig",
    "stack": "mlenv.modules.crossing_stack:CrossingStackConfig",
    "transformer": "mlenv.modules.field_attention:FieldTransformerConfig",
}
"""Crossings by the name that ``model.crossing.kind`` takes. Import paths, because some of them hold others of the table."""


def check_several_fields(kind: str, field_dims: Sequence[int]) -> None:
    """Raises ConfigError unless there are fields to cross: pairs of a single field do not exist."""
    if len(field_dims) < 2:
        fix = "name more features, or put it first in the stack: what comes out of another crossing is one field"
        raise ConfigError("kind", expected=f"two fields or more for {kind!r} to cross", received=list(field_dims), fix=fix)
