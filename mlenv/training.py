"""The whole job: train, measure on held-out days, report."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlenv.catalogue.feature_record import FEATURES_FILE, record_features
from mlenv.checks.backfill_checks import compare_pairs, read_pairs
from mlenv.checks.validation import check_baseline, validate_statistics, window_by_day
from mlenv.config import ExperimentConfig
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.datasets.statistics import STATISTICS_FILE, Statistics, read_statistics
from mlenv.experiment import SPLITS, Experiment, Split
from mlenv.loops.evaluate import Evaluation, evaluate
from mlenv.loops.fit import fit
from mlenv.loops.journal import JOURNAL_FILE, Journal
from mlenv.loops.ranks import is_main
from mlenv.loops.training_run import CHECKPOINT_FOLDER, CONFIG, UnseenLossError
from mlenv.pages.page import write_whole
from mlenv.pages.report import Report, write_report

logger = logging.getLogger(__name__)

STATISTICS_ROWS = 262_144
"""Training rows that the statistics kept with a run are taken of."""
PREDICTIONS = "predictions"
METRICS = "metrics.json"
REPORT = "report.html"


@dataclass(frozen=True)
class TrainingResult:
    """What a training leaves in its output folder."""

    steps: int
    evaluation: Evaluation | None
    """On the test window; None without one."""
    report: Path | None
    tracked_as: str
    """The run in MLflow; empty when it is not tracked."""


def train(
    config: ExperimentConfig,
    *,
    on_evaluation: Callable[[int, Mapping[str, float]], None] | None = None,
    parent: Path | None = None,
) -> TrainingResult:
    """Trains to the end, or goes on where a killed run stopped; then measures the model on the test window and reports.

    Args:
        on_evaluation, parent: of a trial; see Experiment.

    Raises:
        MlenvError: the config, the columns of the data or a checkpoint cannot be used, before anything is written; or a
            value in a row cannot, when its row group is read, and then the run stays as the last checkpoint left it.
        GateError: ``checks.before_training`` is set, and the training window fails; nothing is written.
        TrainingError: the loss of a step is no number or above ``loop.max_loss``, and ``loop.on_bad_loss`` does not skip it.
        StoppedError: SIGTERM or SIGUSR1 came; the last step is in a checkpoint.
    """
    make = partial(Experiment, config, on_evaluation=on_evaluation, parent=parent)
    try:
        return _train(make())
    except UnseenLossError as error:
        logger.warning("%s Now the steps since the last checkpoint run again, and each loss is looked at first.", error)
        return _train(make(sees_every_loss=True))


def _train(experiment: Experiment) -> TrainingResult:
    config = experiment.config
    with experiment:
        splits: list[Split] = [split for split in SPLITS if getattr(config.data, split) is not None]
        for split in splits:
            _ = experiment.source(split).joins  # all windows are checked before the first step
        # Where they may stop the training, every process takes them, and comes to the same verdict.
        taken = _training_statistics(experiment) if is_main() or config.checks.before_training else None
        if taken is not None and config.checks.before_training:
            _check_training_window(taken[0], config, experiment.source("train"))
        progress = fit(experiment.step, experiment.source("train"), experiment.run, config.loop)
        if taken is not None and is_main():
            for name, text in ((STATISTICS_FILE, taken[0].to_json()), (FEATURES_FILE, taken[1])):
                write_whole(text, experiment.output / name)
                experiment.keep(experiment.output / name)
        checkpoint = experiment.load()
        experiment.calibrate(checkpoint)
        experiment.run.copy()  # with the calibrators
        evaluation = evaluate_and_report(experiment) if "test" in splits else None
        if evaluation is not None and is_main():
            _journal_once(Journal(experiment.output / JOURNAL_FILE), progress.step, evaluation)
            experiment.run.journal.sync()
            for name in (METRICS, REPORT):
                experiment.keep(experiment.output / name)
        experiment.keep(checkpoint, "model")
        report = experiment.output / REPORT if evaluation is not None else None
    # Asked only now that all has been sent.
    return TrainingResult(progress.step, evaluation, report, experiment.tracked_as)


def evaluate_and_report(experiment: Experiment) -> Evaluation:
    """Scores the test window; writes predictions, metrics and the report into the output folder."""
    output, schema, source = experiment.output, experiment.schema, experiment.source("test")
    evaluation = evaluate(experiment.model, source, output / PREDICTIONS, experiment.calibrators)
    if not is_main():
        return evaluation
    finite = {name: value if math.isfinite(value) else None for name, value in evaluation.metrics.items()}
    write_whole(json.dumps(finite, indent=2), output / METRICS)
    report = Report(
        title=experiment.config.name,
        facts=experiment.facts | _calibration_facts(experiment),
        tasks=schema.tasks,
        metrics=evaluation.metrics,
        best=evaluation.best,
        reliability=evaluation.reliability,
        uncalibrated=evaluation.uncalibrated,
        reliability_before=evaluation.reliability_before,
        history=Journal(output / JOURNAL_FILE).read(),
        coverage=read_statistics(output).coverage if (output / STATISTICS_FILE).exists() else {},
        artifacts={"predictions": PREDICTIONS, "statistics": STATISTICS_FILE, "config": CONFIG, "checkpoints": CHECKPOINT_FOLDER},
    )
    write_report(report, output / REPORT)
    return evaluation


def _training_statistics(experiment: Experiment) -> tuple[Statistics, str]:
    """Of the whole training window where it is to be judged, otherwise of a sample: a training does not wait for more.

    With them comes the text of what the run records of its features, day by day.
    """
    source, checks = experiment.source("train"), experiment.config.checks
    file, features = experiment.output / STATISTICS_FILE, experiment.output / FEATURES_FILE
    if not checks.before_training and file.exists() and features.exists():
        stored = read_statistics(file)
        if stored.data_fingerprint == source.fingerprint:
            return stored, features.read_text(encoding="utf-8")
    statistics, days = window_by_day(source, at_most=0 if checks.before_training else STATISTICS_ROWS)
    return statistics, record_features(statistics, days, checks.significance).to_json()


def _check_training_window(statistics: Statistics, config: ExperimentConfig, source: ParquetSource) -> None:
    baseline = read_statistics(Path(config.checks.baseline)) if config.checks.baseline else None
    if baseline is not None:
        check_baseline(baseline, statistics, config.checks.baseline)
    pairs = compare_pairs(read_pairs(source, config.checks), config.schema, config.checks)
    verdict = validate_statistics(statistics, baseline, config.schema, config.checks, config.data.train, pairs)
    for finding in verdict.raised:
        logger.warning("data.train: %s of %s: %s Fix: %s.", finding.check, finding.subject, finding.detail, finding.fix)
    verdict.require("data.train")


def _calibration_facts(experiment: Experiment) -> dict[str, str]:
    fitted = {task: calibrator.kind for task, calibrator in experiment.calibrators.items()}
    wanted = dict.fromkeys(experiment.config.calibration, "none; the log of the training says why")
    return {f"{task} calibration": kind for task, kind in (wanted | fitted).items()}


def _journal_once(journal: Journal, step: int, evaluation: Evaluation) -> None:
    """Adds the test metrics, unless a training that was already complete is only run again and measures the same."""
    values = {f"test/{name}": value for name, value in evaluation.metrics.items()}
    measured = [line for line in journal.read() if values.keys() <= line.keys()]
    if not measured or measured[-1]["step"] != step or any(repr(measured[-1][name]) != repr(value) for name, value in values.items()):
        journal.append(step, values)
