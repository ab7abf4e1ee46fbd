"""The commands that train, measure and ask one model: ``mlenv train``, ``evaluate``, ``predict``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlenv.commands.configured import in_processes, with_config
from mlenv.errors import DONE

if TYPE_CHECKING:
    from mlenv.config import ExperimentConfig
    from mlenv.loops.evaluate import Evaluation


def add_training_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line; ``verb`` makes one."""
    for name, run, text in (
        ("train", _train, "Train a model, or continue a killed training; measure it on the test window; write a report."),
        ("evaluate", _evaluate, "Measure the model that a training kept on the test window again, and write the report again."),
        ("predict", _predict, "Write the predictions of the model that a training kept for the test window."),
    ):
        made = verb(verbs, name, partial(with_config, partial(in_processes, run)), text)
        made.add_argument("config", type=Path, help="YAML file; settings may follow as key=value")
        if name == "predict":
            made.add_argument("--out", type=Path, required=True, help="folder for the predictions")


def _train(config: ExperimentConfig, options: argparse.Namespace) -> int:
    from mlenv.loops.ranks import is_main
    from mlenv.training import train

    result = train(config)
    if not is_main():
        return DONE
    print(f"trained {result.steps:,} steps -> {config.output}")
    if result.evaluation is not None:
        print(_table(result.evaluation, config.schema.tasks))
        print(f"report   {result.report}")
    if result.tracked_as:
        print(f"MLflow   {result.tracked_as} (mlenv ui)")
    return DONE


def _evaluate(config: ExperimentConfig, options: argparse.Namespace) -> int:
    from mlenv.experiment import Experiment
    from mlenv.loops.ranks import is_main
    from mlenv.training import REPORT, evaluate_and_report

    with Experiment(config) as experiment:
        checkpoint = experiment.load()
        evaluation = evaluate_and_report(experiment)
    if not is_main():
        return DONE
    print(f"measured {checkpoint}")
    print(_table(evaluation, config.schema.tasks))
    print(f"report   {Path(config.output) / REPORT}")
    return DONE


def _predict(config: ExperimentConfig, options: argparse.Namespace) -> int:
    from mlenv.experiment import Experiment
    from mlenv.loops.evaluate import predict
    from mlenv.loops.ranks import is_main

    with Experiment(config) as experiment:
        checkpoint = experiment.load()
        num_rows = predict(experiment.model, experiment.source("test"), options.out, experiment.calibrators)
    if is_main():
        print(f"{num_rows:,} rows scored with {checkpoint} -> {options.out}")
    return DONE


def _table(evaluation: Evaluation, tasks: Sequence[str]) -> str:
    """The figures of each task, beside the best reachable where the data know the truth."""
    names = {"auc": "AUC", "normalized_entropy": "NE", "calibration": "calibration"}
    best = {"auc": "best AUC", "normalized_entropy": "best NE"} if evaluation.best else {}
    rows = [["task", *names.values(), *best.values()]]
    for task in tasks:
        figures = [evaluation.metrics.get(f"{task}/{name}") for name in names] + [evaluation.best.get(f"{task}/{name}") for name in best]
        rows.append([task, *("-" if figure is None else f"{figure:.4f}" for figure in figures)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
