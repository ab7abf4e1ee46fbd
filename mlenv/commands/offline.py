"""The commands about offline figures and what they say about traffic: ``mlenv offline``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from mlenv.commands.rows import add_rows, rows_from
from mlenv.errors import DONE


def add_offline_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line; ``verb`` makes one."""
    text = "Know what offline figures say about traffic."
    group = verbs.add_parser("offline", help=text, description=text).add_subparsers(required=True, metavar="VERB")

    made = verb(group, "compare", _compare, "Measure two stored models on the same rows, each difference with its interval.")
    made.add_argument("first", help="output folder, checkpoint or model that MLflow keeps")
    made.add_argument("second", help="the one whose gain is asked for")
    add_rows(made)
    made.add_argument("--out", type=Path, help="folder for comparison.html and comparison.json")

    made = verb(group, "policy", _policy, "Estimate what another policy would have earned, from traffic with known probabilities.")
    made.add_argument("log", type=Path, help="Parquet file or folder: a row for each decision, or for each candidate")
    for name, needed, text in (
        ("reward", True, "what was earned by what was shown"),
        ("propensity", True, "the logging policy's probability of what was shown"),
        ("policy", False, "the other policy's probability of what was shown; rows are decisions"),
        ("score", False, "a model's score of each candidate, from which the other policy chooses; rows are candidates"),
        ("shown", False, "whether the candidate was shown"),
        ("request", False, "rows that belong together"),
        ("expected", False, "a model's reward, of each candidate or of what was shown: for the doubly robust estimate"),
        ("expected-policy", False, "a model's mean reward of what the other policy shows; rows are decisions"),
    ):
        made.add_argument(f"--{name}", required=needed, default="", metavar="COLUMN", help=text)
    made.add_argument("--chooses", default="greedy:0", metavar="HOW", help="greedy:SHARE of random choices, or softmax:TEMPERATURE")
    made.add_argument("--clip", type=float, default=math.inf, help="largest weight of a row")
    made.add_argument("--out", type=Path, help="file for the figures, as JSON")

    made = verb(group, "track", _track, "Say how well offline metrics have foretold experiments, from a table of both.")
    made.add_argument("table", type=Path, help="CSV or Parquet: online and online_error, and a column for each offline metric")
    made.add_argument("--metric", action="append", default=[], metavar="COLUMN", help="may be given again; all numbers if left out")
    made.add_argument("--out", type=Path, help="file for the figures, as JSON")


def _compare(options: argparse.Namespace) -> int:
    from mlenv.inference.stored_scorer import open_scorer
    from mlenv.offline.model_pair import compare_models
    from mlenv.offline.model_pair_page import pair_text, write_pair
    from mlenv.pages.page import check_out

    check_out(options.out)
    first, second = open_scorer(options.first, options.uri, "FIRST"), open_scorer(options.second, options.uri, "SECOND")
    rows = rows_from(options, second)
    if options.dry_run:
        print(f"would measure {options.first} and {options.second} on {rows.path}, {rows.window}")
        return DONE
    found = compare_models(first, second, rows, second.sections.gates)
    print(pair_text(found))
    if options.out is not None:
        facts = {"first": options.first, "second": options.second, "rows": f"{found.num_rows:,} of {rows.path}, {rows.window}"}
        print(f"page     {write_pair(found, facts, options.out)}")
    return DONE


def _policy(options: argparse.Namespace) -> int:
    from mlenv.offline.policy import evaluate_policy
    from mlenv.offline.policy_log import PolicyColumns, read_log

    columns = PolicyColumns(
        reward=options.reward,
        propensity=options.propensity,
        policy=options.policy,
        request=options.request,
        shown=options.shown,
        score=options.score,
        chooses=options.chooses,
        expected=options.expected,
        expected_policy=options.expected_policy,
    )
    if options.dry_run:
        print(f"would read {', '.join(columns.names)} of {options.log}")
        return DONE
    log = read_log(options.log, columns)
    found = evaluate_policy(log, options.clip)
    print(
        f"{len(log.rewards):,} decisions, worth {found.effective_rows:,.0f} under the other policy; weights average {found.mean_weight:.3f}"
    )
    for name, one in {"logged": found.logged, **found.estimates}.items():
        print(f"{name.ljust(13)}  {one.value:.6f}  {one.low:.6f} to {one.high:.6f}")
    for warning in found.warnings:
        print(f"WARN  {warning}")
    _keep(found, options.out)
    return DONE


def _track(options: argparse.Namespace) -> int:
    from mlenv.offline.track_record import read_table, records

    if options.dry_run:
        print(f"would read {options.table}")
        return DONE
    found = records(read_table(options.table), options.metric)
    for one in found:
        print(f"{one.metric}: {one.sentence}")
        print(
            f"      rank correlation {one.rank_correlation:+.2f}, {one.low:+.2f} to {one.high:+.2f}; signs agree {one.agreement:.0%}; "
            f"online change {one.slope:+.4g} ± {one.slope_error:.2g} for one of it; {one.experiments} experiments"
        )
    _keep(found, options.out)
    return DONE


def _keep(found: object, out: Path | None) -> None:
    if out is None:
        return
    import dataclasses
    import json

    from mlenv.pages.page import write_whole

    plain = [dataclasses.asdict(one) for one in found] if isinstance(found, list) else dataclasses.asdict(found)  # type: ignore[call-overload]
    write_whole(json.dumps(plain, indent=2), out)
    print(f"wrote {out}")
