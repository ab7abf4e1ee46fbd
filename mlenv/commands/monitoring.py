"""The command that looks after a model in use: ``mlenv monitor``."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlenv.commands.figures import verdict_text
from mlenv.commands.rows import add_rows
from mlenv.errors import DONE, GATE, ConfigError

if TYPE_CHECKING:
    from mlenv.monitoring.check import Checked


def add_monitoring_commands(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]
) -> None:
    """Adds it to the command line; ``verb`` makes one."""
    text = "Hold a model in use against what it was when it was tested: scores, features, age of data and model; exit code 3 when it fails."
    made = verb(verbs, "monitor", _monitor, text)
    made.add_argument("model", help="output folder, checkpoint or model that MLflow keeps")
    add_rows(made)
    made.add_argument("--last-days", type=int, default=0, metavar="N", help="only the last days until now, instead of --start and --end")
    made.add_argument("--no-labels", action="store_true", help="the rows have no labels, or they are not to be read")
    made.add_argument("--reference", type=Path, metavar="FILE", help="what the model saw when it was tested; written when it is not there")
    made.add_argument("--now", type=_moment, metavar="TIME", help="count ages until this moment, such as 2026-01-07T12:00, in UTC")
    made.add_argument("--out", type=Path, help="folder for monitor.html and monitor.json")
    made.add_argument("--experiment", default="", metavar="NAME", help="keep the figures in a run of this experiment of MLflow")
    made.add_argument("--serve", action="store_true", help="go on checking, and answer Prometheus at /metrics")
    made.add_argument("--every", type=float, default=3600, metavar="SECONDS", help="between two checks with --serve")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines too")
    made.add_argument("--port", type=int, default=9108)


def _moment(text: str) -> datetime.datetime:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a time as 2026-01-07T12:00. Received: {text!r}") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def _monitor(options: argparse.Namespace) -> int:
    from mlenv.inference.stored_scorer import open_scorer, rows_for
    from mlenv.monitoring.check import check_model
    from mlenv.monitoring.observation import reference_of
    from mlenv.pages.page import check_out

    if options.last_days and (options.start or options.end):
        raise ConfigError("--last-days", expected="no --start or --end beside it", received=options.last_days)
    check_out(options.out)
    scorer = open_scorer(options.model, options.uri)

    def check() -> Checked:
        at = options.now or datetime.datetime.now(datetime.UTC)
        start = f"{at - datetime.timedelta(days=options.last_days):%Y-%m-%d}" if options.last_days else options.start
        rows = rows_for(scorer, options.path, start, options.end)
        checked = check_model(options.model, scorer, rows, reference, at, has_labels=not options.no_labels)
        if options.out is not None:
            checked.write(options.out, scorer)
        if options.experiment:
            from mlenv.monitoring.tracked import track

            track(checked, options.experiment, options.uri)
        return checked

    if options.dry_run:
        print(f"would hold {options.model} on {rows_for(scorer, options.path, options.start, options.end).path} against its test window")
        return DONE
    reference = reference_of(scorer, options.reference)
    if options.serve:
        from mlenv.monitoring.server import serve_monitor

        serve_monitor(check, host=options.host, port=options.port, every_seconds=options.every)
        return DONE
    checked = check()
    print(verdict_text(checked.verdict))
    if options.out is not None:
        print(f"page     {options.out / 'monitor.html'}")
    return GATE if checked.verdict.severity == "fail" else DONE
