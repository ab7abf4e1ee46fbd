"""Two models on the same rows: every metric of both, with the interval of the difference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from mlenv.config import GatesConfig
from mlenv.inference.stored_scorer import HeldOut, StoredScorer
from mlenv.models.gates import Figure, measure
from mlenv.models.paired_scoring import check_row_key, pair, score


@dataclass(frozen=True, kw_only=True)
class ModelPair:
    """What the second model is beside the first."""

    figures: Sequence[Figure]
    """``champion`` is the first model, and a gain is that of the second."""
    lost_tasks: Sequence[str]
    """Tasks that only the first one has."""
    num_rows: int
    """That both have scored, of the task with the most."""


def compare_models(first: StoredScorer, second: StoredScorer, rows: HeldOut, gates: GatesConfig) -> ModelPair:
    """Each model reads the rows its own way; they are joined by the row key of the second.

    Args:
        gates: resamples, confidence, and the share of the rows that both must have; the margins name the metrics.

    Raises:
        ConfigError: the second model's schema has no row key.
        DataError: no rows, or too few that both have.
    """
    check_row_key(second.schema, "the second model")
    with ExitStack() as opened:
        sources = [scorer.source(rows, second.schema) for scorer in (second, first)]
        for source in sources:
            opened.callback(source.close)
        scored = [score(scorer, source, gates) for scorer, source in zip((second, first), sources, strict=True)]
    paired = pair(scored[0], scored[1], second.schema, first.schema.tasks, gates.common_rows)
    return ModelPair(
        figures=measure(paired, gates),
        lost_tasks=paired.lost_tasks,
        num_rows=max(len(task.labels) for task in paired.tasks.values()),
    )
