"""The commands about the catalogue of features, read from the runs that MLflow keeps: ``mlenv features``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from mlenv.errors import DONE, GATE, ConfigError

if TYPE_CHECKING:
    from mlenv.catalogue.feature_catalogue import CatalogueReader


def add_feature_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line; ``verb`` makes one."""
    from mlenv.schema import Entity

    text = "Know the features of all tracked runs: what they are, who uses them, how they have been."
    group = verbs.add_parser("features", help=text, description=text).add_subparsers(required=True, metavar="VERB")
    for name, run, text in (
        ("list", _features_list, "List the features of all runs, with coverage, drift and use."),
        ("show", _features_show, "Show one feature: its definition, its coverage and drift by day, its use."),
        ("usage", _features_usage, "Name the data sets, runs and registered model versions that use a feature."),
        ("alerts", _features_alerts, "Compare the coverage of what registered models use with their training; exit code 3 for a failure."),
        ("serve", _features_serve, "Show the catalogue as pages, to this machine alone."),
    ):
        made = verb(group, name, partial(_with_catalogue, run), text)
        if name in ("show", "usage"):
            made.add_argument("feature")
        if name == "list":
            made.add_argument("--entity", choices=get_args(Entity), default="", help="only features of it")
            made.add_argument("--owner", default="", help="only features of this owner")
            made.add_argument("--match", default="", metavar="TEXT", help="only features with this text in what the list says of them")
        if name == "alerts":
            made.add_argument("--all", action="store_true", help="all registered versions, also those without an alias")
            made.add_argument("--config", type=Path, help="measure the data of this config now, instead of what later runs recorded")
            made.add_argument("--window", choices=["train", "validation", "test"], help="of the config; the test window if there is one")
        if name == "serve":
            made.add_argument("--port", type=int, default=5001)
        made.add_argument("--uri", default="", help="where the runs are, as in tracking.uri; otherwise where training puts them by default")
        made.add_argument("--experiment", default="", help="only runs of this MLflow experiment")


def _with_catalogue(run: Callable[[CatalogueReader, argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Finds the runs of a command; a dry run says where they are and goes no further."""
    from mlenv.catalogue.feature_catalogue import CatalogueReader
    from mlenv.records.mlflow_outbox import without_password
    from mlenv.records.mlflow_store import store_uri

    uri = store_uri(options.uri)
    if options.dry_run:
        if getattr(options, "config", None):
            from mlenv.composition import compose
            from mlenv.dry_run import check_data

            check_data(compose(options.config, options.overrides))
        print(f"would read the runs of {without_password(uri)}")
        return DONE
    return run(CatalogueReader(uri, options.experiment), options)


def _features_list(reader: CatalogueReader, options: argparse.Namespace) -> int:
    from mlenv.catalogue.feature_text import list_text

    catalogue = reader.read()
    print(list_text(catalogue, catalogue.matching(entity=options.entity, owner=options.owner, text=options.match)))
    return DONE


def _features_show(reader: CatalogueReader, options: argparse.Namespace) -> int:
    from mlenv.catalogue.feature_text import show_text

    print(show_text(reader.read().feature(options.feature)))
    return DONE


def _features_usage(reader: CatalogueReader, options: argparse.Namespace) -> int:
    from mlenv.catalogue.feature_text import usage_text

    print(usage_text(reader.read().feature(options.feature)))
    return DONE


def _features_alerts(reader: CatalogueReader, options: argparse.Namespace) -> int:
    from mlenv.catalogue.feature_alerts import find_alerts, measure
    from mlenv.catalogue.feature_text import alerts_text
    from mlenv.composition import compose

    if options.window and options.config is None:
        raise ConfigError("--window", expected="--config beside it, whose window it is", received=options.window)
    catalogue = reader.read()
    measured = measure(compose(options.config, options.overrides), options.window) if options.config else None
    alerts = find_alerts(catalogue, every_version=options.all, measured=measured)
    print(alerts_text(alerts))
    return GATE if alerts.has_failure else DONE


def _features_serve(reader: CatalogueReader, options: argparse.Namespace) -> int:
    from mlenv.catalogue.feature_pages import serve

    reader.read()  # what is wrong is said here, not in the browser
    print(f"open http://127.0.0.1:{options.port}/", flush=True)
    serve(reader, options.port)
    return DONE
