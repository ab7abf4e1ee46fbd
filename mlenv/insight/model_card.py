"""A model card: all that somebody should know who is to rely on a stored model, on one page.

Source: Mitchell et al., "Model Cards for Model Reporting", FAT* 2019, arXiv:1810.03993.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from mlenv.config import GatesConfig
from mlenv.errors import DataError
from mlenv.inference.stored_scorer import rows_for
from mlenv.insight.embedding_health import TableHealth, table_healths
from mlenv.insight.explanation import InsightOptions, figures_of, gain_insight, opened, source_of
from mlenv.insight.importance import Importance
from mlenv.insight.model_card_page import CardPage, render_card
from mlenv.insight.model_origin import Origin, find_origin
from mlenv.insight.row_sample import read_sample
from mlenv.loops.metrics import BinaryMetrics, ReliabilityCurve
from mlenv.models.bootstrap import TaskRows
from mlenv.models.gates import Figure, Loss, PairedRows, measure
from mlenv.models.paired_scoring import Scored, missing_losses, pair, score
from mlenv.pages.page import check_out, write_whole
from mlenv.schema import Schema

logger = logging.getLogger(__name__)

PAGE: Final = "model_card.html"
FIGURES: Final = "model_card.json"
FOLDER: Final = "model card"
"""Of the run in MLflow."""

LOW_COVERAGE: Final = 0.5
"""A feature that fewer of the training rows have is named among the limits."""
MANY_COLLISIONS: Final = 0.2
"""A table in which more of the ids share a row is named."""
MANY_UNSEEN: Final = 0.05
"""A table in which more of the lookups find an untrained row is named."""

_MAX_NAMED: Final = 8


def write_card(
    name: str, out: Path, options: InsightOptions, *, notes: str = "", path: str = "", start: str = "", end: str = "", uri: str = ""
) -> CardPage:
    """Measures a stored model on all rows of a window, and writes the page and its figures.

    Args:
        name: an output folder, a checkpoint, or a model that MLflow keeps.
        out: folder for both; its parent exists.
        notes: what the model is meant for, as text: paragraphs, and headings that begin with ``#``.
        path, start, end: see ``rows_for``.

    Raises:
        ConfigError: there is no such model, segment or window.
        DataError: the rows cannot be read, or have too few labels.
        MlenvError: MLflow has the model, and does not answer.
    """
    check_out(out)
    with opened(name, uri) as (checkpoint, scorer):
        rows = rows_for(scorer, path, start, end)
        origin = find_origin(name, checkpoint, uri)
        gates = scorer.sections.gates
        with closing(source_of(scorer, rows, options)) as source:
            logger.info("scoring %s rows of %s", f"{source.num_stored_rows:,}", rows.path)
            scored = score(scorer, source, gates)
            alone = _with_rows(pair(scored, None, replace(source.schema, row_key=()), (), 0.0))  # nothing is joined
            insight = gain_insight(scorer, rows, read_sample(source, options.num_rows, options.seed), options)
            healths = table_healths(scorer.model, checkpoint, source)
            figures = measure(alone, gates)
            losses = missing_losses(scored, None)
            page = CardPage(
                title=str(origin.config["name"]),
                name=name,
                notes=notes,
                schema=source.schema,
                origin=origin,
                rows=rows,
                num_rows=len(scored.labels),
                num_bytes=scorer.num_bytes,
                metrics=scored.metrics,
                figures=figures,
                confidence=gates.confidence,
                reliability=_reliability(scored, source.schema.tasks),
                insight=insight,
                losses=losses,
                missing_share=gates.missing_share,
                healths=healths,
                limits=list(_limits(alone, figures, losses, insight.importances, healths, origin, source.schema, gates)),
                written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            )
    out.mkdir(exist_ok=True)
    write_whole(json.dumps(_plain(page), indent=1), out / FIGURES)
    write_whole(render_card(page), out / PAGE)
    return page


def log_card(page: CardPage, out: Path) -> str:
    """Adds the card to the model's run in MLflow, where whoever looks at the version finds it; the place.

    Raises:
        DataError: the model is of no run that MLflow has.
    """
    from mlenv.records.mlflow_store import asking, open_store

    run = page.origin.run_id
    if not run:
        fix = "train with tracking.enabled, or name the model as models:/NAME@ALIAS"
        raise DataError(page.name, expected="a model of a run that MLflow has", received="none", fix=fix)
    client = open_store(page.origin.uri)
    with asking(page.origin.uri, f"run {run}"):
        for file in (PAGE, FIGURES):
            client.log_artifact(run, str(out / file), FOLDER)
    return f"runs:/{run}/{FOLDER}"


def _with_rows(paired: PairedRows) -> PairedRows:
    """Without the tasks that have no rows, of which nothing can be measured."""
    return replace(paired, tasks={task: rows for task, rows in paired.tasks.items() if len(rows.labels)})


def _reliability(scored: Scored, tasks: Sequence[str]) -> dict[str, ReliabilityCurve]:
    metrics = BinaryMetrics(tasks)
    metrics.update(*(torch.from_numpy(values) for values in (scored.predictions, scored.labels, scored.weights)))
    return {task: metrics.reliability(task) for task in tasks}


def _limits(
    rows: PairedRows,
    figures: Sequence[Figure],
    losses: Sequence[Loss],
    importances: Sequence[Importance],
    healths: Sequence[TableHealth],
    origin: Origin,
    schema: Schema,
    gates: GatesConfig,
) -> Iterator[str]:
    """Sentences about what the model should not be relied on for."""
    for task in schema.tasks:
        if task not in rows.tasks:
            yield f"{task}: the window has no label, so nothing is known of this task"
        elif not 0 < rows.tasks[task].labels.sum() < len(rows.tasks[task].labels):
            yield f"{task}: the window has labels of one kind only, so nothing is known of how well it ranks"
    for task, task_rows in rows.tasks.items():
        for column, segment in rows.segments.get(task, {}).items():
            few = _too_few(task_rows, segment.codes, segment.values, gates.least_labels)
            if few:
                least = f"fewer than {gates.least_labels} labels of a kind"
                yield f"{task}, {column} {_listed(few)}: {least}; what is said of all may not hold there"
    for one in figures:
        bound = gates.segment_calibration if one.segment else gates.calibration
        if one.metric == "calibration" and (one.low > 1 + bound or one.high < 1 / (1 + bound)):
            word = "too many" if one.value > 1 else "too few"
            yield f"{one.task} {one.segment}".strip() + f": it predicts {word} positives, {one.value:.2f} times as many as there are"
    coverage = origin.statistics.coverage if origin.statistics is not None else {}
    if thin := [f"{name} ({share:.0%})" for name, share in coverage.items() if share < LOW_COVERAGE]:
        yield f"few training rows have {_listed(thin)}"
    overall = [one for one in importances if not one.segment and one.metric == "auc" and not one.is_group]
    clear = {one.feature for one in overall if one.is_clear}
    if idle := [name for name in dict.fromkeys(one.feature for one in overall) if name not in clear]:
        yield f"no task measurably needs {_listed(idle)}"
    for loss in losses:
        if loss.loss > gates.missing_loss:
            lost = f"{loss.loss:.3f} of AUC when {gates.missing_share:.0%} of the rows lack them"
            yield f"{loss.task}: it depends on the {loss.features} and loses {lost}"
    for table in healths:
        if table.colliding is not None and table.colliding > MANY_COLLISIONS:
            yield f"table {table.table}: {table.colliding:.0%} of its ids share a row with another id"
        if table.unseen > MANY_UNSEEN:
            yield f"table {table.table}: {table.unseen:.0%} of the lookups find a row that was never trained"


def _too_few(rows: TaskRows, codes: Any, values: Sequence[str], least: int) -> list[str]:
    positives = np.bincount(codes, rows.labels, len(values))
    smaller = np.minimum(positives, np.bincount(codes, minlength=len(values)) - positives)
    return [values[place] for place in np.flatnonzero(smaller < least).tolist()]


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _plain(page: CardPage) -> dict[str, Any]:
    insight = figures_of(page.insight, list(page.healths))
    metrics = {name: value if np.isfinite(value) else None for name, value in page.metrics.items()}
    return {
        "model": page.name,
        "fingerprint": page.origin.fingerprint,
        "written": page.written,
        "metrics": metrics,
        "figures": [asdict(one) for one in page.figures],
        "missing_features": [asdict(one) for one in page.losses],
        "limits": list(page.limits),
        **insight,
    }
