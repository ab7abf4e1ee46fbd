"""The commands that hold a stored model against what was served: ``mlenv replay``, ``mlenv simulate``, ``mlenv skew``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mlenv.commands.rows import add_rows, rows_from
from mlenv.errors import DONE, GATE, ConfigError
from mlenv.pages.page import check_out

_SHOWN: Final = 10
"""Lines of a list on the screen; the page has all."""


def add_replay_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line; ``verb`` makes one."""
    text = "Compare scores of a log with those that a stored model gives on the log's features, or on rows that --path, --start or --end "
    text += "name; exit code 3 when more rows differ than may."
    made = verb(verbs, "replay", _replay, text)
    made.add_argument("model", help="output folder, checkpoint or model that MLflow keeps")
    made.add_argument("--logged", required=True, metavar="LOG", help="Parquet log with the row key and the score, and the features served")
    add_rows(made)
    made.add_argument("--key", action="append", default=[], metavar="NAME[=NAME]", help="column of the row key in the log, and in the rows")
    made.add_argument("--score", action="append", default=[], metavar="TASK=COLUMN", help="column of a task's score; prediction_TASK")
    made.add_argument("--time", default="", metavar="COLUMN", help="time in the log; served_at, or the event time of the schema")
    made.add_argument("--tolerance", type=float, default=1e-4, help="difference of two predictions that does not count")
    made.add_argument("--limit", type=float, default=0.01, help="share of the rows that may differ")
    made.add_argument("--blame-rows", type=int, default=20_000, help="rows in which the features behind a difference are looked for")
    made.add_argument("--out", type=Path, help="folder for replay.html and replay.json")

    text = "Say how far predictions, AUC and calibration move when features are missing, stale or wrong."
    made = verb(verbs, "simulate", _simulate, text)
    made.add_argument("model", help="output folder, checkpoint or model that MLflow keeps")
    add_rows(made)
    made.add_argument("--share", type=float, default=0.2, help="of the rows that are hit")
    made.add_argument("--features", default="", metavar="NAMES", help="only these, with commas between")
    made.add_argument("--kinds", default="", metavar="NAMES", help="some of missing, stale, other, scaled, negated, with commas between")
    made.add_argument("--group", action="append", default=[], metavar="NAME=FEATURES", help="features that go missing together")
    made.add_argument("--peak-hours", type=int, default=4, help="hours of the day in which groups go missing altogether; 0 for none")
    made.add_argument("--rows", type=int, default=100_000, help="rows that are read at most")
    made.add_argument("--history-days", type=int, default=3, help="days before the rows that stale values are looked for in")
    made.add_argument("--resamples", type=int, default=50, help="draws of requests for the intervals")
    made.add_argument("--seed", type=int, default=0, help="of the rows that are hit")
    made.add_argument("--out", type=Path, help="folder for simulation.html and simulation.json")

    text = "Compare served feature values with logged ones, joined by row key; exit code 3 when a feature differs in more rows than may."
    made = verb(verbs, "skew", _skew, text)
    made.add_argument("served", help="Parquet log of the values served")
    made.add_argument("logged", help="Parquet log of the values that training reads")
    made.add_argument("--key", action="append", default=[], metavar="NAME[=NAME]", help="column of the row key, served and logged")
    made.add_argument("--features", default="", metavar="NAMES", help="only these columns, with commas between")
    made.add_argument(
        "--entity", default="", metavar="NAMES", help="columns of LOGGED with the ids of users or items, to find stale values"
    )
    made.add_argument("--time", default="", metavar="COLUMN", help="time in LOGGED, to find stale values")
    made.add_argument("--limit", type=float, default=0.01, help="share of the rows that may differ")
    made.add_argument("--tolerance", type=float, default=1e-3, help="share of the usual difference of two rows that does not count")
    made.add_argument("--out", type=Path, help="folder for skew.html and skew.json")


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _pairs(texts: list[str], option: str, form: str) -> dict[str, str]:
    """Of ``NAME=VALUE``."""
    for text in texts:
        if not all(text.partition("=")):
            raise ConfigError(option, expected=form, received=text)
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def _replay(options: argparse.Namespace) -> int:
    from mlenv.robustness.parquet_log import key_from
    from mlenv.robustness.score_replay import ReplayOptions, replay_scores, write_replay

    wanted = ReplayOptions(
        key=key_from(options.key),
        scores=_pairs(options.score, "--score", "TASK=COLUMN"),
        time=options.time,
        tolerance=options.tolerance,
        limit=options.limit,
        num_blamed=options.blame_rows,
    )
    are_named = bool(options.path or options.start or options.end)
    if options.dry_run:
        on = "the rows of its data set that are named" if are_named else "the features of the log"
        print(f"would compare the scores of {options.logged} with those of {options.model} on {on}")
        return DONE
    check_out(options.out)
    from mlenv.inference.stored_scorer import open_scorer

    scorer = open_scorer(options.model, options.uri)
    found = replay_scores(scorer, options.model, options.logged, rows_from(options, scorer) if are_named else None, wanted)
    for one in found.overall:
        print(
            f"{one.task.ljust(12)}  {one.differs:.2%} of {one.num_rows:,} rows differ, mean {one.apart:.2e}, largest {one.largest:.2e}; "
            f"mean prediction {one.logged:.5f} logged, {one.replayed:.5f} replayed"
        )
    for blame in [one for one in found.blames if not one.feature or one.explained > 0.01][:_SHOWN]:
        print(f"{blame.task.ljust(12)}  {blame.explained:.1%} explained by {blame.feature or 'all features of the log'}")
    for note in found.notes:
        print(f"note     {note}")
    if options.out is not None:
        print(f"page     {write_replay(found, options.out)}")
    return GATE if found.is_above else DONE


def _simulate(options: argparse.Namespace) -> int:
    from mlenv.robustness.simulation import SimulationOptions, simulate, write_simulation

    plain = SimulationOptions()
    groups = _pairs(options.group, "--group", "NAME=FEATURES")
    wanted = SimulationOptions(
        share=options.share,
        features=_names(options.features),
        kinds=_names(options.kinds) or plain.kinds,  # type: ignore[arg-type]  # checked by the options
        groups={name: _names(features) for name, features in groups.items()},
        peak_hours=options.peak_hours,
        num_rows=options.rows,
        history_days=options.history_days,
        resamples=options.resamples,
        seed=options.seed,
    )
    if options.dry_run:
        print(f"would corrupt {wanted.share:.0%} of the rows of {options.model}: {', '.join(wanted.kinds)}")
        return DONE
    check_out(options.out)
    from mlenv.inference.stored_scorer import open_scorer

    scorer = open_scorer(options.model, options.uri)
    found = simulate(scorer, options.model, rows_from(options, scorer), wanted)
    for task, figures in found.whole.items():
        print(f"{task.ljust(12)}  AUC {figures['auc']:.4f}, calibration {figures['calibration']:.4f} with every feature as it is")
    for feature, score in list(found.stability.items())[:_SHOWN]:
        print(f"{score:8.4f}  stability of {feature} when it is missing in {wanted.share:.0%} of the rows")
    for one in [effect for effect in found.effects if effect.is_group]:
        print(f"{one.auc_change:+8.4f}  AUC of {one.task}: {one.kind}, {one.subject}; calibration {one.calibration:.4f}")
    for note in found.notes:
        print(f"note     {note}")
    if options.out is not None:
        print(f"page     {write_simulation(found, options.out)}")
    return DONE


def _skew(options: argparse.Namespace) -> int:
    from mlenv.robustness.parquet_log import key_from
    from mlenv.robustness.skew import SkewOptions, find_skew, write_skew

    wanted = SkewOptions(
        key=key_from(options.key),
        features=_names(options.features),
        entities=_names(options.entity),
        time=options.time,
        limit=options.limit,
        tolerance=options.tolerance,
    )
    if options.dry_run:
        print(f"would compare the features of {options.served} with those of {options.logged}")
        return DONE
    check_out(options.out)
    found = find_skew(options.served, options.logged, wanted)
    for one in [feature for feature in found.features if feature.differs][:_SHOWN]:
        mark = "SKEW" if one.is_above else "    "
        print(f"{mark}  {one.feature}: {one.differs:.2%} of the rows ({one.low:.2%} to {one.high:.2%}), score {one.score:.4f}; {one.guess}")
    print(f"{len(found.above)} of {len(found.features)} features differ in more than {found.limit:.2%} of {found.num_common:,} common rows")
    if options.out is not None:
        print(f"page     {write_skew(found, options.out)}")
    return GATE if found.above else DONE
