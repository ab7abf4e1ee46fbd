"""The command line: a thin layer over what Python can do as well."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from mlenv.commands.ci import add_ci_commands
from mlenv.commands.data import add_data_commands
from mlenv.commands.doctor import add_doctor_commands
from mlenv.commands.features import add_feature_commands
from mlenv.commands.images import add_image_commands
from mlenv.commands.insight import add_insight_commands
from mlenv.commands.jobs import add_job_commands
from mlenv.commands.model_repo import add_model_repo_commands
from mlenv.commands.monitoring import add_monitoring_commands
from mlenv.commands.offline import add_offline_commands
from mlenv.commands.prediction import add_prediction_commands
from mlenv.commands.registry import add_registry_commands
from mlenv.commands.replay import add_replay_commands
from mlenv.commands.search import add_search_commands
from mlenv.commands.serving import add_serving_commands
from mlenv.commands.tracking import add_tracking_commands
from mlenv.commands.training import add_training_commands
from mlenv.errors import (
    FAILED,
    GATE,
    STOPPED,
    WRONG_INPUT,
    GateError,
    ImageError,
    MlenvError,
    StoppedError,
    TrainingError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 wrong usage, config or data, 3 a gate said no, 75 told to stop."""
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    options, rest = parser.parse_known_args(words[:end])
    if "command" in options:
        options.command = words[end + 1 :]  # what mlenv image run is to run; no options of ours
    elif end < len(words):
        rest += words[end:]
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word]:
        parser.error(f"unknown arguments: {' '.join(unknown)}. Settings are given as key=value.")
    options.overrides = rest
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("mlenv").setLevel(logging.INFO)
    # Read by OpenMP when torch is loaded: compute threads that spin while they wait take the cores that decode the data.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path.insert(0, os.getcwd())  # a model repo's own classes are named by import path
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except (TrainingError, ImageError) as error:
        print(f"mlenv: {error}", file=sys.stderr)
        return FAILED
    except GateError as error:
        print(f"mlenv: {error}", file=sys.stderr)
        return GATE
    except MlenvError as error:
        print(f"mlenv: {error}", file=sys.stderr)
        return WRONG_INPUT
    except OSError as error:  # a full or read-only disk, a server out of reach: nothing that a traceback would explain
        print(f"mlenv: {error}", file=sys.stderr)
        return FAILED
    except StoppedError as error:
        print(f"mlenv: stopped by {error}; the same command goes on", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("mlenv: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlenv", description="Trains, measures and tracks ranking models.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        group: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        made = group.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
        made.set_defaults(run=run)
        return made

    for add in (
        add_training_commands,
        add_prediction_commands,
        add_data_commands,
        add_search_commands,
        add_job_commands,
        add_feature_commands,
        add_registry_commands,
        add_insight_commands,
        add_serving_commands,
        add_replay_commands,
        add_monitoring_commands,
        add_offline_commands,
        add_tracking_commands,
        add_doctor_commands,
        add_image_commands,
        add_ci_commands,
        add_model_repo_commands,
    ):
        add(verbs, verb)
    return parser
