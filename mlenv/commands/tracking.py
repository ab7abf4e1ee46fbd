"""The commands about tracked runs: ``mlenv runs`` and ``mlenv ui``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mlenv.errors import DONE


def add_tracking_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line; ``verb`` makes one."""
    runs = verbs.add_parser("runs", help="Look after tracked runs.", description="Look after tracked runs.").add_subparsers(
        required=True, metavar="VERB"
    )
    made = verb(runs, "send", _send, "Send MLflow what it has not got of a training, because its server was away.")
    made.add_argument("output", type=Path, help="output folder of the training")

    made = verb(verbs, "ui", _ui, "Open MLflow on the runs tracked here.")
    made.add_argument("--uri", default="", help="where the runs are, as in tracking.uri; otherwise where training puts them by default")
    made.add_argument("--port", type=int, default=5000)


def _send(options: argparse.Namespace) -> int:
    from mlenv.records.tracking import send_pending, tracked_run

    uri = tracked_run(options.output).uri
    if options.dry_run:
        print(f"would send what MLflow at {uri} has not got of {options.output}")
        return DONE
    send_pending(options.output)
    print(f"MLflow at {uri} has all of run {tracked_run(options.output).run_id}")
    return DONE


def _ui(options: argparse.Namespace) -> int:
    from mlenv.records.mlflow_store import store_uri

    uri = store_uri(options.uri)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(options.port)]
    if uri.startswith(("http://", "https://")):
        print(f"the runs are at {uri}")
        return DONE
    if options.dry_run:
        print(" ".join(command))
        return DONE
    # MLflow's pages open on language-model traces unless the address asks for training runs.
    print(f"open http://127.0.0.1:{options.port}/#/experiments?workflowType=machine_learning", flush=True)
    os.execv(sys.executable, command)
