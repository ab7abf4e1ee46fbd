"""The commands that train and measure one model: ``mlenv train``, ``evaluate``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlenv.commands.configured import in_processes, with_config
from mlenv.commands.figures import figures_table
from mlenv.errors import DONE

if TYPE_CHECKING:
    from mlenv.config import ExperimentConfig


def add_training_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line; ``verb`` makes one."""
    for name, run, text in (
        ("train", _train, "Train a model, or continue a killed training; measure it on the test window; write a report."),
        ("evaluate", _evaluate, "Measure the model that a training kept on the test window again, and write the report again."),
    ):
        made = verb(verbs, name, partial(with_config, partial(in_processes, run)), text)
        made.add_argument("config", type=Path, help="YAML file; settings may follow as key=value")


def _train(config: ExperimentConfig, options: argparse.Namespace) -> int:
    from mlenv.loops.ranks import is_main
    from mlenv.training import train

    result = train(config)
    if not is_main():
        return DONE
    print(f"trained {result.steps:,} steps -> {config.output}")
    if result.evaluation is not None:
        print(figures_table(result.evaluation.metrics, config.schema.tasks, result.evaluation.best))
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
    print(figures_table(evaluation.metrics, config.schema.tasks, evaluation.best))
    print(f"report   {Path(config.output) / REPORT}")
    return DONE
