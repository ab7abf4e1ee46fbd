"""Predictions of stored models for logged rows: every row once, in parts that a killed run need not do again, measured on the way."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from mlenv.batch import Extra
from mlenv.datasets.parquet_source import ParquetSource, open_folder
from mlenv.datasets.ray_cluster import check_address
from mlenv.datasets.stored_files import describe_files
from mlenv.datasets.workers import ThreadsConfig
from mlenv.errors import ConfigError, DataError, Problems, check_at_least
from mlenv.inference.part_scoring import BATCH_ROWS, Part, PartScorer, Reading, Tally, divide
from mlenv.inference.prediction_folder import PredictionFolder
from mlenv.inference.scoring_workers import in_actors, in_threads
from mlenv.inference.stored_scorer import HeldOut, StoredScorer, open_scorer, rows_for
from mlenv.loops.metrics import BinaryMetrics
from mlenv.loops.thread_budget import available_cores

logger = logging.getLogger(__name__)

PART_ROWS: Final = 131_072
_LOG_SECONDS: Final = 10
_NAME: Final = re.compile(r"[\w.-]+")
LOCAL: Final = "local"
"""Starts a Ray cluster of this machine."""


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Which rows, what of them, and who does it."""

    path: str = ""
    """Data set to read; empty for the one that the first model was trained with. Without path, start and end, its test window is read."""
    start: str = ""
    """First day, YYYY-MM-DD."""
    end: str = ""
    """Last day."""
    keep: tuple[str, ...] = ()
    """Columns to carry over, beside the row key, the request, the time and the segments of the schema."""
    has_labels: bool = True
    """Whether labels are read, written and measured; without, none of their columns need be there."""
    workers: int = 0
    """Threads or actors, each on a core; 0 for all cores of this machine."""
    ray: str = ""
    """Ray cluster whose actors score: auto, host:port, or local to start one. Empty scores in threads of this process."""
    part_rows: int = PART_ROWS
    """Rows of a part at least, if its file has so many; each worker holds a part in memory."""
    tracking_uri: str = ""
    """Where MLflow is, for models that it keeps."""

    def __post_init__(self) -> None:
        check_at_least("part_rows", self.part_rows, 1)
        check_at_least("workers", self.workers, 0)
        check_address("" if self.ray == LOCAL else self.ray)


@dataclass(frozen=True)
class Predicted:
    """What a folder of predictions holds."""

    folder: Path
    num_rows: int
    num_parts: int
    num_repeated: int
    """Rows whose row key another row before them has: the data repeat it."""
    num_scored: Mapping[str, int]
    """Rows with predictions, by model."""
    metrics: Mapping[str, dict[str, float]]
    """As ``metrics.json`` of a training has them, by model; empty without labels."""


@dataclass(frozen=True)
class Inference:
    """What is going to be done; made by ``prepare``."""

    scorer: PartScorer
    rows: HeldOut
    parts: Sequence[Part]
    options: InferenceOptions
    manifest: Mapping[str, Any]
    """All that the predictions hang on."""

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)


def predict(models: Sequence[str | Path], out: Path, options: InferenceOptions = InferenceOptions()) -> Predicted:
    """Writes a row of predictions for every logged row, and goes on where an earlier call of the same was killed.

    Args:
        models: output folders, checkpoints, or models that MLflow keeps; each may have a name, ``NAME=MODEL``.
        out: a folder of its own.

    Raises:
        ConfigError: a model is not there, the rows are not named, or the folder holds something else.
        Problems, DataError: the data do not fit a model; or a row cannot be used.
        OSError: a part cannot be written; those before it stay.
    """
    return run(prepare(models, options), out)


def prepare(models: Sequence[str | Path], options: InferenceOptions = InferenceOptions()) -> Inference:
    """Opens the models and the data, and looks at columns; reads no rows.

    Raises:
        ConfigError, Problems, DataError: see predict.
    """
    scorers = _open(models, options.tracking_uri)
    first = next(iter(scorers.values()))
    if not first.schema.row_key:
        fix = "name them in the schema, and train again"
        raise ConfigError("schema.row_key", expected="columns that identify a row", received=[], fix=fix)
    rows = rows_for(first, options.path, options.start, options.end)
    readings = list(_readings(scorers, rows, options))
    scorer = PartScorer(scorers, readings, has_labels=options.has_labels)
    source = readings[0].source
    _check_names(scorer, options.keep)
    manifest = {
        "models": {name: one.fingerprint for name, one in scorers.items()},
        "files": _describe(rows, source),
        "tables": [reading.source.table_fingerprints for reading in readings],
        "keep": list(options.keep),
        "has_labels": options.has_labels,
        "part_rows": options.part_rows,
        "batch_rows": BATCH_ROWS,
        "device": first.device.type,
        "torch": torch.__version__,
    }
    return Inference(scorer, rows, divide(source.row_groups, options.part_rows), options, _as_json(manifest))


def run(inference: Inference, out: Path) -> Predicted:
    """Scores the parts that the folder does not hold yet.

    Raises:
        ConfigError, DataError, OSError: see predict.
    """
    options = inference.options
    with PredictionFolder(out, inference.manifest) as folder:
        there = {part.name for part in inference.parts if folder.holds(part.name, part.num_rows)}
        missing = [part for part in inference.parts if part.name not in there]
        if not missing and folder.record is not None:
            return _read(folder, inference)
        folder.reopen()
        if there:
            logger.info("%s: %d of %d parts are there", out, len(there), len(inference.parts))
        workers = min(options.workers or available_cores(), max(len(missing), 1))
        address = "" if options.ray == LOCAL else options.ray
        scored = in_actors(inference.scorer, missing, workers, address) if options.ray else in_threads(inference.scorer, missing, workers)
        total = _Total(inference)
        with closing(scored):  # a part that cannot be written ends the threads too
            for part in inference.parts:
                if part.name in there:
                    total.add(inference.scorer.tally(folder.read(part.name)))
                else:
                    done = next(scored)
                    folder.write(part.name, done.file)
                    total.add(done.tally)
        _check_unchanged(inference)
        folder.finish(total.record, total.metrics)
        return _read(folder, inference)


class _Total:
    """What is known of the parts so far, added up in their order, so that the sums come out the same every time."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self._num_rows, self._num_scored = 0, dict.fromkeys(inference.scorer.scorers, 0)
        self._keys: list[NDArray[np.uint64]] = []
        self._metrics: dict[str, BinaryMetrics] = {}
        self._began = self._said = time.monotonic()

    def add(self, tally: Tally) -> None:
        self._num_rows += tally.num_rows
        self._keys.append(tally.keys)
        for name, metrics in tally.metrics.items():
            self._num_scored[name] += tally.num_scored[name]
            if name in self._metrics:
                self._metrics[name].merge(metrics)
            else:
                self._metrics[name] = metrics
        if time.monotonic() - self._said > _LOG_SECONDS:
            self._said = time.monotonic()
            logger.info("%d of %d rows after %d s", self._num_rows, self._inference.num_rows, self._said - self._began)

    @property
    def record(self) -> dict[str, Any]:
        assert self._num_rows == self._inference.num_rows
        keys = np.concatenate(self._keys)
        repeated = len(keys) - len(np.unique(keys))
        if repeated:
            logger.warning("%d rows have a row key that a row before them has: the data repeat it, and so do the predictions", repeated)
        return {"rows": self._num_rows, "parts": len(self._inference.parts), "repeated": repeated, "scored": self._num_scored}

    @property
    def metrics(self) -> dict[str, dict[str, float | None]]:
        if not self._inference.options.has_labels:
            return {}
        computed = {name: metrics.compute() for name, metrics in self._metrics.items()}
        return {name: {key: value if math.isfinite(value) else None for key, value in one.items()} for name, one in computed.items()}


def _read(folder: PredictionFolder, inference: Inference) -> Predicted:
    record = folder.record
    assert record is not None
    metrics = {name: folder.metrics(name) for name in inference.scorer.scorers} if inference.options.has_labels else {}
    return Predicted(folder.path, record["rows"], record["parts"], record["repeated"], record["scored"], metrics)


def _open(models: Sequence[str | Path], tracking_uri: str) -> dict[str, StoredScorer]:
    """By the names that are given, or else those of their experiments.

    Raises:
        ConfigError: there is no such model, or two have one name.
    """
    scorers: dict[str, StoredScorer] = {}
    for model in map(str, models):
        given, _, rest = model.partition("=")
        is_named = bool(rest) and _NAME.fullmatch(given) is not None and not Path(model).exists()
        scorer = open_scorer(rest if is_named else model, tracking_uri)
        name = given if is_named else "-".join(_NAME.findall(scorer.sections.name)) or "model"
        if name in scorers:
            fix = f"give them names: {name}=MODEL OTHER=MODEL"
            raise ConfigError("MODEL", expected="models with different names", received=[name, name], fix=fix)
        scorers[name] = scorer
    if not scorers:
        raise ConfigError("MODEL", expected="at least one model", received=[])
    return scorers


def _readings(scorers: Mapping[str, StoredScorer], rows: HeldOut, options: InferenceOptions) -> Iterator[Reading]:
    """The models in groups that read the rows alike: with the same schema, segments aside, and the same transforms."""
    groups: list[list[str]] = []
    for name, scorer in scorers.items():
        for group in groups:
            if _reads(scorers[group[0]]) == _reads(scorer):
                group.append(name)
                break
        else:
            groups.append([name])
    extras: tuple[Extra, ...] = ("metadata",)
    for place, group in enumerate(groups):
        segments = tuple(dict.fromkeys(segment for name in group for segment in scorers[name].schema.segments))
        first = scorers[group[0]]
        threads = ThreadsConfig(num_threads=options.workers or available_cores())
        data = replace(first.sections.data, path=rows.path, allow_missing_days=True, on_bad_file="fail", workers=threads)
        try:
            source = ParquetSource(
                data,
                rows.window,
                replace(first.schema, segments=segments),
                extras=extras,
                carried=options.keep if place == 0 else (),
                has_labels=options.has_labels,
            )
        except Problems as error:
            missing = [name for name in first.schema.label_columns if f"column {name!r}: expected a column of this name" in str(error)]
            if options.has_labels and missing:
                fix = "score rows without labels with --no-labels, in Python has_labels=False"
                labels = DataError("labels", expected=f"columns {missing}", received="none", fix=fix)
                raise Problems(f"data under {rows.path}", [*error.problems, labels]) from error
            raise
        _ = source.findings  # what only the whole window shows, before threads ask for it
        yield Reading(source, tuple(group))


def _reads(scorer: StoredScorer) -> object:
    return replace(scorer.schema, segments=()), scorer.sections.data.transforms


def _check_names(scorer: PartScorer, keep: Sequence[str]) -> None:
    """Raises ConfigError when a column that is passed through has the name of one that is made."""
    made = {name for names in scorer.columns.values() for name in names}
    passed = [name for scored in scorer.scorers.values() for name in scored.schema.metadata_columns]
    if taken := sorted(made.intersection((*passed, *keep))):
        fix = "leave it out of --keep" if taken[0] in keep else "give the models other names"
        raise ConfigError(f"column {taken[0]!r}", expected="a column that no model gives", received="one of the predictions", fix=fix)


def _describe(rows: HeldOut, source: ParquetSource) -> dict[str, Any]:
    """The files that are read, by path under that of the data."""
    described = describe_files(*open_folder(rows.path), source.files, "footers")
    return {one.path: {key: value for key, value in asdict(one).items() if key in ("rows", "bytes", "footer")} for one in described}


def _check_unchanged(inference: Inference) -> None:
    """Raises DataError when a file is not what it was at the start."""
    now = _describe(inference.rows, inference.scorer.readings[0].source)
    for path, before in inference.manifest["files"].items():
        if now[path] != before:
            fix = "remove the folder of the predictions, and score again"
            raise DataError(path, expected="the file that it was when it was read", received="another one", fix=fix)


def _as_json(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    plain: dict[str, Any] = json.loads(json.dumps(manifest))
    return plain
