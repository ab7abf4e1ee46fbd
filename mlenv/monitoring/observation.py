"""What a model is asked about, and what it says, in one window: the statistics of the rows and of the scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from mlenv.datasets.statistics import Statistics, collect, statistics_columns
from mlenv.errors import DataError
from mlenv.inference.stored_scorer import HeldOut, StoredScorer
from mlenv.monitoring.scores import ScoreCounts
from mlenv.pages.page import write_whole

FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One window, seen by one model."""

    model: str
    """Fingerprint of the checkpoint."""
    window: str
    """Path and days, in words."""
    statistics: Statistics
    scores: dict[str, ScoreCounts]
    """By task."""

    def to_json(self) -> str:
        """A document that ``read_observation`` reads back."""
        scores = {task: counts.to_plain() for task, counts in self.scores.items()}
        plain = {"format": FORMAT, "model": self.model, "window": self.window, "scores": scores}
        return json.dumps({**plain, "statistics": json.loads(self.statistics.to_json())}, separators=(",", ":"))


def observe(scorer: StoredScorer, rows: HeldOut, *, has_labels: bool = True) -> Observation:
    """Reads the rows twice: as they are, and to score them.

    Args:
        has_labels: whether the labels are read. Without, their columns need not be there.

    Raises:
        DataError, Problems: there is no row, or a column that the model reads is not there.
    """
    scores: dict[str, ScoreCounts] = {}
    tasks = scorer.schema.tasks
    with closing(scorer.source(rows, has_labels=has_labels)) as source:
        for batch in source.batches():
            parts = (part.double().numpy() for part in (scorer(batch), batch.labels, batch.weights))
            predictions, labels, weights = parts
            for place, task in enumerate(tasks):
                counted = ScoreCounts.of(predictions[:, place], np.nan_to_num(labels[:, place]), weights[:, place])
                scores[task] = scores[task].merged(counted) if task in scores else counted
        if not scores:
            raise source.nothing_left()
        columns = statistics_columns(scorer.schema, source.column_names)
        read = source.record_batches(columns if has_labels else tuple(set(columns) - set(scorer.schema.label_columns)))
        statistics = collect(read if has_labels else _with_null_labels(read, scorer.schema.label_columns), scorer.schema)
    return Observation(model=scorer.fingerprint, window=f"{rows.path}, {rows.window}", statistics=statistics, scores=scores)


def _with_null_labels(batches: Iterator[pa.RecordBatch], labels: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        columns = {name: batch.column(name) for name in batch.schema.names}
        yield pa.RecordBatch.from_pydict(columns | {name: pa.nulls(batch.num_rows, pa.float64()) for name in labels})


def read_observation(file: Path) -> Observation:
    """
    Raises:
        DataError: the file holds something else.
    """
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        if plain["format"] != FORMAT:
            raise ValueError(f"format {plain['format']}")
        scores = {task: ScoreCounts.from_plain(counts) for task, counts in plain["scores"].items()}
        statistics = Statistics.from_json(json.dumps(plain["statistics"]))
        return Observation(model=plain["model"], window=plain["window"], statistics=statistics, scores=scores)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        received = f"{type(error).__name__}: {error}"
        fix = "name a file that mlenv monitor wrote, or a new one"
        raise DataError(str(file), expected="what a model saw in a window", received=received, fix=fix) from error


def reference_of(scorer: StoredScorer, file: Path | None) -> Observation:
    """What the model saw in the test window of its own config; read from the file where there is one, and else written there.

    Raises:
        ConfigError: the model was trained without a test window.
        DataError: the file holds something else, or what another model saw.
    """
    from mlenv.inference.stored_scorer import rows_for

    if file is not None and file.exists():
        reference = read_observation(file)
        if reference.model != scorer.fingerprint:
            fix = "keep a reference for each model: name a new file"
            raise DataError(str(file), expected=f"the reference of model {scorer.fingerprint}", received=f"of {reference.model}", fix=fix)
        return reference
    reference = observe(scorer, rows_for(scorer))
    if file is not None:
        write_whole(reference.to_json(), file)
    return reference
