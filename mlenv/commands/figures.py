"""Metrics as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mlenv.checks.findings import Verdict

_FIGURES: Final = {"auc": "AUC", "normalized_entropy": "NE", "calibration": "calibration"}
_BEST: Final = {"auc": "best AUC", "normalized_entropy": "best NE"}


def figures_table(metrics: Mapping[str, float], tasks: Sequence[str], best: Mapping[str, float] | None = None) -> str:
    """The figures of each task, beside the best reachable where the data know the truth."""
    shown = _BEST if best else {}
    rows = [["task", *_FIGURES.values(), *shown.values()]]
    for task in tasks:
        figures = [metrics.get(f"{task}/{name}") for name in _FIGURES] + [(best or {}).get(f"{task}/{name}") for name in shown]
        rows.append([task, *("-" if figure is None else f"{figure:.4f}" for figure in figures)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def verdict_text(verdict: Verdict) -> str:
    """What was raised, each with what to do, and the verdict."""
    lines = []
    for finding in verdict.raised:
        limit = "" if finding.limit is None else f" (limit {finding.limit:.4g})"
        lines.append(f"{finding.severity.upper()}  {finding.check.ljust(21)}  {finding.subject}  {finding.value:.4g}{limit}")
        lines.append(f"      {finding.detail} To do: {finding.fix}.")
    return "\n".join([*lines, f"{verdict.severity}: {len(verdict.raised)} of {len(verdict.findings)} figures beyond their limits"])
