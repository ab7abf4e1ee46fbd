"""The command that says whether a machine or a container is fit for a training: ``mlenv doctor``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mlenv.errors import DONE, FAILED

if TYPE_CHECKING:
    from mlenv.condition import Condition


def add_doctor_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line; ``verb`` makes one."""
    text = (
        "Say what this machine or container has for a training: versions, GPUs, memory, disk, servers; exit code 1 when something is wrong."
    )
    made = verb(verbs, "doctor", _doctor, text)
    made.add_argument("--json", action="store_true", help="print it as JSON")
    made.add_argument("--mlflow", default="", metavar="URI", help="ask this MLflow; otherwise MLFLOW_TRACKING_URI when it is set")
    made.add_argument(
        "--ray", default="", metavar="ADDRESS", help="auto, host:port or http://HEAD:8265; otherwise RAY_ADDRESS when it is set"
    )
    made.add_argument("--folder", type=Path, default=Path(), help="where trainings write; here when left out")
    made.add_argument("--need", action="append", default=[], metavar="NAME", help="torchrec, ray, gpu ...: wrong when it is not there")
    made.add_argument("--without", action="append", default=[], metavar="NAME", help="torch, mlflow ...: left out on purpose")


def _doctor(options: argparse.Namespace) -> int:
    from mlenv.condition import is_fine
    from mlenv.doctor import Questions, examine

    questions = Questions(mlflow=options.mlflow, ray=options.ray, folder=options.folder, needed=options.need, left_out=options.without)
    if options.dry_run:
        print("would look at versions, accelerator, cores, shared memory, disk, MLflow and Ray")
        return DONE
    conditions = examine(questions)
    print(_json(conditions) if options.json else page(conditions))
    return DONE if is_fine(conditions) else FAILED


def page(conditions: Sequence[Condition]) -> str:
    """A line for each, with the fix under what is not well, and a line that sums up."""
    width = max(len(condition.subject) for condition in conditions)
    lines = []
    for condition in conditions:
        lines.append(f"{condition.severity}  {condition.subject.ljust(width)}  {condition.found}")
        if condition.fix:
            lines.append(f"{' ' * (width + 8)}Fix: {condition.fix}.")
    counts = [sum(condition.severity == severity for condition in conditions) for severity in ("fail", "warn")]
    return "\n".join([*lines, f"{counts[0]} wrong, {counts[1]} to look at"])


def _json(conditions: Sequence[Condition]) -> str:
    from mlenv.condition import is_fine

    return json.dumps({"is_fine": is_fine(conditions), "conditions": [asdict(condition) for condition in conditions]}, indent=2)
