"""The commands that look into a stored model: ``mlenv explain`` and ``mlenv card``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlenv.commands.rows import add_rows
from mlenv.errors import DONE, ConfigError, check_at_least

if TYPE_CHECKING:
    from mlenv.insight.explanation import Explanation, InsightOptions

_MODEL = "output folder of a training, a checkpoint, or a model that MLflow keeps"


def add_insight_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line; ``verb`` makes one."""
    text = "Say which features a stored model goes by: what it loses without each, what adds to single predictions; and how its tables are."
    made = verb(verbs, "explain", _explain, text)
    made.add_argument("model", help=_MODEL)
    made.add_argument("--out", type=Path, help="folder for explanation.html, explanation.json and attributions.parquet")
    made.add_argument("--feature", action="append", default=[], metavar="NAME", help="look at this feature only; may be repeated")
    made.add_argument("--local", type=int, default=0, metavar="K", help="explain so many predictions one by one; needs --out")
    _add_closeness(made)
    add_rows(made)

    text = (
        "Write the card of a stored model: intended use, quality by segment, importance, robustness, tables, data, lineage, known limits."
    )
    made = verb(verbs, "card", _card, text)
    made.add_argument("model", help=_MODEL)
    made.add_argument("--out", type=Path, required=True, help="folder for model_card.html and model_card.json")
    made.add_argument("--notes", type=Path, metavar="FILE", help="text that says what the model is for, and what not")
    made.add_argument("--log-to-run", action="store_true", help="add the card to the training's run in MLflow")
    _add_closeness(made)
    add_rows(made)


def _add_closeness(made: argparse.ArgumentParser) -> None:
    made.add_argument("--rows", type=int, default=20_000, help="rows of the window that importance is measured on; 20,000 when left out")
    made.add_argument("--repeats", type=int, default=5, help="times that the values of each feature are dealt out anew; 5 when left out")
    made.add_argument("--segment", action="append", default=[], metavar="COLUMN", help="tell importance by its values; may be repeated")
    made.add_argument("--seed", type=int, default=0)


def _closeness(options: argparse.Namespace, *, features: tuple[str, ...] = (), num_local: int = 0) -> InsightOptions:
    from mlenv.insight.explanation import InsightOptions

    for name, value, least in (("--rows", options.rows, 1), ("--repeats", options.repeats, 2), ("--local", num_local, 0)):
        check_at_least(name, value, least)
    return InsightOptions(
        num_rows=options.rows,
        num_repeats=options.repeats,
        features=features,
        segments=tuple(options.segment),
        num_local=num_local,
        seed=options.seed,
    )


def _explain(options: argparse.Namespace) -> int:
    if options.local and options.out is None:
        raise ConfigError("--local", expected="a folder for the attributions", received=None, fix="name one with --out")
    wanted = _closeness(options, features=tuple(options.feature), num_local=options.local)
    if options.dry_run:
        where = f", and write to {options.out}" if options.out is not None else ""
        print(f"would look at {wanted.num_rows:,} rows of {options.path or 'the test window'} with {options.model}{where}")
        return DONE
    from mlenv.insight.explanation import PAGE, explain

    found = explain(options.model, wanted, path=options.path, start=options.start, end=options.end, uri=options.uri, out=options.out)
    print(explanation_text(found))
    if options.out is not None:
        print(f"page     {options.out / PAGE}")
    return DONE


def _card(options: argparse.Namespace) -> int:
    wanted = _closeness(options)
    notes = ""
    if options.notes is not None:
        try:
            notes = options.notes.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("--notes", expected="a text file", received=str(options.notes), fix=str(error)) from error
    if options.dry_run:
        print(f"would measure {options.model} on {options.path or 'the test window'}, and write its card to {options.out}")
        return DONE
    from mlenv.insight.model_card import PAGE, log_card, write_card

    where = {"path": options.path, "start": options.start, "end": options.end, "uri": options.uri}
    page = write_card(options.model, options.out, wanted, notes=notes, **where)
    for limit in page.limits:
        print(f"limit    {limit}")
    print(f"card     {options.out / PAGE}")
    if options.log_to_run:
        print(f"MLflow   {log_card(page, options.out)}")
    return DONE


def explanation_text(found: Explanation) -> str:
    """The lost AUC of every feature, by task, the most important first."""
    overall = [one for one in found.insight.importances if one.metric == "auc" and not one.segment]
    width = max(len(one.feature) for one in overall)
    lines = []
    for task in dict.fromkeys(one.task for one in overall):
        lines.append(f"{task}: AUC lost without a feature, on {found.insight.num_rows:,} rows")
        of_task = sorted((one for one in overall if one.task == task), key=lambda one: (one.is_group, -one.loss))
        lines += [f"  {one.feature:{width}}  {one.loss:+.4f}  ({one.low:+.4f} to {one.high:+.4f})" for one in of_task]
    return "\n".join([*lines, *(f"not measured: {note}" for note in found.insight.notes)])
