"""Options of commands that ask stored models about rows."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlenv.inference.stored_scorer import HeldOut, StoredScorer


def add_rows(made: argparse.ArgumentParser) -> None:
    """``--path``, ``--start``, ``--end``, without which the model's test window is read, and ``--uri``."""
    made.add_argument("--path", default="", help="data set to read; otherwise the one that the model was trained with")
    made.add_argument("--start", default="", metavar="DAY", help="first day, YYYY-MM-DD; the test window without any of the three")
    made.add_argument("--end", default="", metavar="DAY", help="last day")
    made.add_argument("--uri", default="", help="where MLflow is, for a model that it keeps")


def rows_from(options: argparse.Namespace, scorer: StoredScorer) -> HeldOut:
    """What the options of `add_rows` name."""
    from mlenv.inference.stored_scorer import rows_for

    return rows_for(scorer, options.path, options.start, options.end)
