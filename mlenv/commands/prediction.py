"""The command that asks stored models about logged rows: ``mlenv predict``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from mlenv.commands.figures import figures_table
from mlenv.commands.rows import add_rows
from mlenv.errors import DONE, ConfigError


def add_prediction_commands(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]
) -> None:
    """Adds it to the command line; ``verb`` makes one."""
    text = "Write the predictions of stored models for logged rows, each row once; go on with a killed run of the same."
    made = verb(verbs, "predict", _predict, text)
    made.add_argument(
        "models", nargs="+", metavar="MODEL", help="output folder, checkpoint or model that MLflow keeps; NAME=MODEL names it"
    )
    made.add_argument("--out", type=Path, required=True, help="folder for the predictions")
    add_rows(made)
    made.add_argument("--keep", default="", metavar="COLUMNS", help="columns to carry over, with commas between")
    made.add_argument("--no-labels", action="store_true", help="the rows have no labels, or they are not to be read")
    made.add_argument(
        "--workers", type=int, default=0, metavar="N", help="threads, or actors with --ray; all cores of this machine if left out"
    )
    made.add_argument("--ray", default="", metavar="ADDRESS", help="score on a Ray cluster: auto, host:port, or local to start one")
    made.add_argument("--part-rows", type=int, metavar="N", help="rows that are held in memory, written and done again at once")


def _predict(options: argparse.Namespace) -> int:
    from mlenv.inference.batch_inference import PART_ROWS, InferenceOptions, prepare, run
    from mlenv.inference.prediction_folder import check_folder

    if options.overrides:
        received = " ".join(options.overrides)
        raise ConfigError(received, expected="no settings: a stored model is asked as it was trained", received=received)
    wanted = InferenceOptions(
        path=options.path,
        start=options.start,
        end=options.end,
        keep=tuple(filter(None, options.keep.split(","))),
        has_labels=not options.no_labels,
        workers=options.workers,
        ray=options.ray,
        part_rows=PART_ROWS if options.part_rows is None else options.part_rows,
        tracking_uri=options.uri,
    )
    inference = prepare(options.models, wanted)
    of = f"{inference.num_rows:,} rows of {inference.rows.path}, {inference.rows.window}"
    names = ", ".join(inference.scorer.scorers)
    if options.dry_run:
        check_folder(options.out, inference.manifest)
        print(f"would score {of}, with {names} in {len(inference.parts)} parts -> {options.out}")
        return DONE
    predicted = run(inference, options.out)
    for name, metrics in predicted.metrics.items():
        print(f"{name}\n{figures_table(metrics, inference.scorer.scorers[name].schema.tasks)}")
    print(f"{predicted.num_rows:,} rows scored with {names} -> {predicted.folder}")
    for name, num_scored in predicted.num_scored.items():
        if num_scored < predicted.num_rows:
            print(f"{predicted.num_rows - num_scored:,} rows have no prediction of {name}: the transforms of its config leave them out")
    if predicted.num_repeated:
        print(f"{predicted.num_repeated:,} rows have a row key that a row before them has")
    return DONE
