"""The features behind a difference of two predictions: rows are scored again with one feature at a time as it was served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from mlenv.batch import Batch
from mlenv.inference.batch_rows import borrow_features
from mlenv.inference.stored_scorer import StoredScorer
from mlenv.robustness.score_parity import PairedScores

_CHUNK: Final = 8192
"""Rows that are scored at once."""


@dataclass(frozen=True, kw_only=True)
class Blame:
    """How much of the difference goes away when the replay reads one feature as it was served, in the rows that differ."""

    task: str
    feature: str
    """Empty for all features of the log together."""
    explained: float
    """1 when the replay then says what was logged; 0 when that changes nothing; below 0 when it makes it worse."""
    changed: float
    """Share of the rows that differ in which the replayed prediction moves, by more than the tolerance."""


def blame_features(scorer: StoredScorer, own: Batch, served: Batch, features: Sequence[str], scores: PairedScores) -> list[Blame]:
    """All features together first, then each, the largest share first.

    Args:
        own: rows that differ, as they are replayed.
        served: the same rows, as they were served.
        features: those that ``served`` has.
        scores: of the same rows.
    """
    every_row, apart = torch.arange(len(own)), scores.apart
    columns = [scorer.schema.tasks.index(task) for task in scores.tasks]
    blames = []
    for name, borrowed in {"": frozenset(features), **{feature: frozenset({feature}) for feature in features}}.items():
        mixed = borrow_features(scorer.schema, own, served, borrowed, every_row)
        parts = [scorer(mixed.rows(start, min(start + _CHUNK, len(mixed)))) for start in range(0, len(mixed), _CHUNK)]
        after = torch.cat(parts).double().numpy()[:, columns]
        left, moves = np.abs(scores.logged - after), np.abs(after - scores.replayed)
        for place, task in enumerate(scores.tasks):
            differs = apart[:, place] > scores.tolerance
            if differs.any():
                explained = 1 - float(left[differs, place].sum() / apart[differs, place].sum())
                changed = float((moves[differs, place] > scores.tolerance).mean())
                blames.append(Blame(task=task, feature=name, explained=explained, changed=changed))
    return sorted(blames, key=lambda one: (one.feature != "", -one.explained, one.feature))
