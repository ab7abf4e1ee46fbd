"""What a stored model goes by: importance of its features, attributions of single predictions, the state of its tables."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mlenv.datasets.parquet_source import ParquetSource
from mlenv.errors import ConfigError, check_at_least, nearest
from mlenv.inference.stored_model import MLFLOW_SCHEMES, find_checkpoint
from mlenv.inference.stored_scorer import HeldOut, StoredScorer, rows_for
from mlenv.insight.attribution import TOLERANCE, Attributions, Attributor
from mlenv.insight.embedding_health import TableHealth, table_healths
from mlenv.insight.explanation_page import ExplanationPage, render_explanation
from mlenv.insight.importance import Importance, groups_to_permute, permutation_importance, permutations, rank_correlation
from mlenv.insight.row_sample import RowSample, read_sample
from mlenv.modules import Representation
from mlenv.pages.page import check_out, write_whole
from mlenv.records.mlflow_store import open_store, store_uri
from mlenv.schema import Schema

logger = logging.getLogger(__name__)

PAGE: Final = "explanation.html"
FIGURES: Final = "explanation.json"
LOCAL: Final = "attributions.parquet"

_BATCH_ROWS: Final = 1024
_LOCAL_ROWS: Final = 32
"""Explained together: they share the steps, which one of them may need."""


@dataclass(frozen=True, kw_only=True)
class InsightOptions:
    """How closely one looks."""

    num_rows: int = 20_000
    """Rows of the window that the importance is measured on, any as likely as any other."""
    num_repeats: int = 5
    """Times that the values of each feature are dealt out anew."""
    features: tuple[str, ...] = ()
    """That are looked at, instead of all and those of each entity together."""
    segments: tuple[str, ...] = ()
    """Columns by whose values the importance is told too."""
    num_local: int = 0
    """Predictions that are explained one by one."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_rows", 1), ("num_repeats", 2), ("num_local", 0)):
            check_at_least(name, getattr(self, name), least)


@dataclass(frozen=True, kw_only=True)
class Insight:
    """What a model goes by, on some rows of a window."""

    rows: HeldOut
    num_rows: int
    importances: list[Importance]
    estimates: dict[str, dict[str, float]]
    """By task and feature, the mean size of the one-pass attribution in logits; empty for a model that has no ``Representation``."""
    correlations: dict[str, float]
    """By task, between the ranks of the estimates and those of the lost AUC; nan where a task has none."""
    notes: list[str]
    """What could not be measured."""
    seconds: tuple[float, float]
    """What the permutations and the one pass took."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """All that ``explain`` found."""

    insight: Insight
    healths: list[TableHealth]
    local: pa.Table | None
    """One row for each prediction and task that is explained: its keys, its figures, and a column ``attribution_FEATURE`` for each."""


@contextmanager
def opened(name: str, uri: str = "") -> Iterator[tuple[Path, StoredScorer]]:
    """The checkpoint and the scorer of a stored model; what is downloaded goes away at the end.

    Raises:
        ConfigError, DataError, CheckpointError: see ``open_scorer``.
    """
    if name.startswith(MLFLOW_SCHEMES):
        open_store(store_uri(uri))  # where there is none, the look-up would make one
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = find_checkpoint(name, store_uri(uri), "MODEL", Path(folder))
        yield checkpoint, StoredScorer(checkpoint)


def explain(
    name: str, options: InsightOptions, *, path: str = "", start: str = "", end: str = "", uri: str = "", out: Path | None = None
) -> Explanation:
    """
    Args:
        name: an output folder, a checkpoint, or a model that MLflow keeps.
        path, start, end: see ``rows_for``.
        out: folder for the page, the figures and the attributions; its parent exists.

    Raises:
        ConfigError: there is no such model, feature, segment or window.
        DataError: the rows cannot be read, or have too few labels.
    """
    if out is not None:
        check_out(out)
    with opened(name, uri) as (checkpoint, scorer):
        rows = rows_for(scorer, path, start, end)
        attributor = Attributor(scorer.model, scorer.schema) if options.num_local else None  # refused before the long work
        with closing(source_of(scorer, rows, options)) as source:
            sample = read_sample(source, options.num_rows, options.seed)
            insight = gain_insight(scorer, rows, sample, options)
            healths = table_healths(scorer.model, checkpoint, source)
            local = None if attributor is None else explain_rows(scorer, attributor, sample, options)
    if out is not None:
        out.mkdir(exist_ok=True)
        if local is not None:
            _write_whole(local, out / LOCAL)
        write_whole(json.dumps(figures_of(insight, healths), indent=1), out / FIGURES)
        write_whole(render_explanation(ExplanationPage(title=name, insight=insight, healths=healths, local=local)), out / PAGE)
    return Explanation(insight=insight, healths=healths, local=local)


def source_of(scorer: StoredScorer, rows: HeldOut, options: InsightOptions) -> ParquetSource:
    """The rows, with the segments that are asked for.

    Raises:
        ConfigError: a feature or a segment is not there.
    """
    schema = scorer.schema
    for name in (name for name in options.features if name not in schema.features):
        raise ConfigError("--feature", expected="a feature of the model", received=name, fix=nearest(name, schema.features))
    if new := tuple(column for column in options.segments if column not in schema.segments):
        with closing(scorer.source(rows)) as source:
            for column in (column for column in new if column not in source.column_names):
                fix = nearest(column, source.column_names)
                raise ConfigError("--segment", expected="a column of the data", received=column, fix=fix)
    return scorer.source(rows, replace(schema, segments=(*schema.segments, *new)))


def gain_insight(scorer: StoredScorer, rows: HeldOut, sample: RowSample, options: InsightOptions) -> Insight:
    """Global importance, measured and estimated."""
    schema = scorer.schema
    groups = groups_to_permute(schema, options.features)
    logger.info("dealing out %d features and groups of %s rows, %d times", len(groups), f"{len(sample):,}", options.num_repeats)
    began = time.perf_counter()
    orders = permutations(len(sample), options.num_repeats, options.seed)
    found, notes = permutation_importance(scorer, sample, groups, orders, segments=options.segments)
    measured = time.perf_counter()
    estimates = _estimates(scorer, sample)
    ended = time.perf_counter()
    return Insight(
        rows=rows,
        num_rows=len(sample),
        importances=found,
        estimates=estimates,
        correlations={task: _correlation(found, task, of_task) for task, of_task in estimates.items()},
        notes=notes,
        seconds=(measured - began, ended - measured),
    )


def explain_rows(scorer: StoredScorer, attributor: Attributor, sample: RowSample, options: InsightOptions) -> pa.Table:
    """Attributions of some rows of the sample, any as likely as any other."""
    schema = scorer.schema
    count = min(options.num_local, len(sample))
    chosen = torch.from_numpy(np.sort(np.random.default_rng(options.seed).choice(len(sample), count, replace=False)))
    tables = []
    for rows in torch.split(chosen, _LOCAL_ROWS):
        batch = sample.take(rows)
        found = attributor.explain(batch)
        if (worst := float(found.gaps.max())) > TOLERANCE:
            logger.warning("attributions of a row add up to something else than its logit, by %.4f; its column 'gap' says which", worst)
        predictions = scorer(batch)
        tables += [_local_table(schema, batch.metadata, task, found, batch.labels, batch.weights, predictions) for task in schema.tasks]
    return pa.concat_tables(tables)


def _local_table(
    schema: Schema, metadata: pa.RecordBatch | None, task: str, found: Attributions, labels: Tensor, weights: Tensor, predictions: Tensor
) -> pa.Table:
    place = schema.tasks.index(task)
    assert metadata is not None
    columns: dict[str, Any] = {name: metadata.column(name) for name in metadata.schema.names}
    figures = {
        "label": torch.where(weights[:, place] > 0, labels[:, place], math.nan),
        "prediction": predictions[:, place],
        "logit": found.logits[:, place],
        "baseline_logit": found.baseline[:, place],
        "gap": found.gaps[:, place],
    }
    columns["task"] = pa.array([task] * len(labels))
    columns |= {name: pa.array(values.numpy(), from_pandas=name == "label") for name, values in figures.items()}
    columns |= {f"attribution_{name}": pa.array(found.values[:, place, number].numpy()) for number, name in enumerate(found.features)}
    return pa.table(columns)


def _estimates(scorer: StoredScorer, sample: RowSample) -> dict[str, dict[str, float]]:
    if sum(isinstance(part, Representation) for part in scorer.model.modules()) != 1:
        return {}
    attributor, tasks = Attributor(scorer.model, scorer.schema), scorer.schema.tasks
    sums = torch.zeros(len(tasks), len(attributor.features))
    for batch in sample.batches(_BATCH_ROWS):
        sums += attributor.estimate(batch).values.abs().sum(0)
    means = (sums / len(sample)).tolist()
    return {task: dict(zip(attributor.features, means[place], strict=True)) for place, task in enumerate(tasks)}


def _correlation(found: list[Importance], task: str, estimates: Mapping[str, float]) -> float:
    lost = {one.feature: one.loss for one in found if (one.task, one.metric, one.segment) == (task, "auc", "") and one.feature in estimates}
    return rank_correlation(list(lost.values()), [estimates[name] for name in lost])


def figures_of(insight: Insight, healths: list[TableHealth]) -> dict[str, Any]:
    """What JSON can hold; null where a figure is not defined."""
    plain = {
        "path": insight.rows.path,
        "window": str(insight.rows.window),
        "rows": insight.num_rows,
        "importance": [asdict(one) for one in insight.importances],
        "one_pass": insight.estimates,
        "rank_correlation": insight.correlations,
        "notes": insight.notes,
        "tables": [asdict(one) for one in healths],
    }
    return {key: _finite(value) for key, value in plain.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_whole(table: pa.Table, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        pq.write_table(table, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
