"""From a config to a verdict about its data: read the window and the baseline, judge, write the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from mlenv.batch import Extra
from mlenv.checks.backfill_checks import compare_pairs, compare_sides, read_pairs, read_sides
from mlenv.checks.findings import Verdict
from mlenv.checks.validation import check_baseline, validate_statistics, window_statistics
from mlenv.checks.validation_page import ValidationPage, render_validation
from mlenv.config import ExperimentConfig, WindowConfig
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.datasets.statistics import STATISTICS_FILE, Statistics, read_statistics
from mlenv.errors import ConfigError
from mlenv.pages.page import check_out, write_whole

VALIDATION_FILE, PAGE_FILE = "validation.json", "validation.html"

Window = Literal["train", "validation", "test"]


def validate(
    config: ExperimentConfig,
    *,
    window: Window | None = None,
    baseline: str = "",
    backfilled: WindowConfig | None = None,
    out: Path | None = None,
) -> Verdict:
    """Judges a window of the config against a baseline, or its back-filled days against its other ones.

    Args:
        window: by default ``test`` if the config has it, else ``train``; with ``backfilled`` it is ``train``.
        baseline: a window of the config, a file of statistics, or the output folder of a training. By default the training
            window; of the training window none, and then it is judged by itself.
        backfilled: days of the window whose features were back-filled; the baseline is the other days, logged as they came.
        out: folder for the page, the findings and the window's statistics; its parent exists.

    Raises:
        ConfigError, DataError: a window or the baseline cannot be read, or ``out`` cannot be written.
    """
    chosen: Window = window or ("train" if config.data.test is None or backfilled else "test")
    against = baseline or ("" if chosen == "train" else "train")
    if against == chosen:
        raise ConfigError("baseline", expected=f"something else than the window {chosen!r}", received=against)
    if backfilled and baseline:
        raise ConfigError("baseline", expected="none beside backfilled, whose baseline is the other days", received=baseline)
    check_out(out)
    source, span, checks = window_source(config, chosen), _span(config, chosen), config.checks
    stored = read_statistics(Path(against)) if against and against not in get_args(Window) else None  # before the long work
    pairs = read_pairs(source, checks)
    measures = [*compare_pairs(pairs, config.schema, checks)]
    facts, sides = {"window": f"{chosen}: {span}"}, None
    before: Statistics | None
    if backfilled is not None:
        sides = read_sides(source, backfilled)
        now, before = (side.statistics for side in sides)
        measures += compare_sides(*sides, checks)
        span = backfilled
        facts |= {"back-filled": str(backfilled), "rows": f"{now.rows:,}", "baseline": "the other days of the window"}
    else:
        now = window_statistics(source)
        before = stored if stored is not None or not against else window_statistics(window_source(config, against))
        facts |= {"rows": f"{now.rows:,}"} | ({"baseline": against} if against else {})
    if before is not None:
        check_baseline(before, now, against)
        facts["rows of the baseline"] = f"{before.rows:,}"
        if unknown := [name for name in now.columns if name not in before.columns]:
            facts["not in the baseline"] = ", ".join(unknown)
    if source.skipped:
        facts["passed over"] = "; ".join(source.skipped)
    verdict = validate_statistics(now, before, config.schema, checks, span, measures)
    if out is not None:
        out.mkdir(exist_ok=True)
        page = ValidationPage(config.name, facts, verdict, now, before, config.schema, sides, pairs, checks.backfills)
        write_whole(now.to_json(), out / STATISTICS_FILE)
        write_whole(json.dumps(facts | verdict.to_plain(), indent=2), out / VALIDATION_FILE)
        write_whole(render_validation(page), out / PAGE_FILE)
    return verdict


def window_source(config: ExperimentConfig, window: str) -> ParquetSource:
    """Rows of a window with all that there is to judge; a missing day is no error.

    Raises:
        ConfigError, Problems, DataError: the config has no such window, or it cannot be read.
    """
    extras: tuple[Extra, ...] = ("metadata",)
    data = replace(config.data, allow_missing_days=True)
    return ParquetSource(data, _span(config, window), config.schema, extras=extras)


def _span(config: ExperimentConfig, window: str) -> WindowConfig:
    span: WindowConfig | None = getattr(config.data, window)
    if span is None:
        raise ConfigError(f"data.{window}", expected="a window", received=None, fix=f"set data.{window}.start and end, or path")
    return span
