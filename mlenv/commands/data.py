"""The commands about data: ``mlenv validate`` and ``mlenv data``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlenv.commands.configured import with_config
from mlenv.commands.figures import verdict_text
from mlenv.errors import DONE, GATE, MlenvError

if TYPE_CHECKING:
    from mlenv.config import ExperimentConfig, WindowConfig


def add_data_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line; ``verb`` makes one."""
    text = "Judge the data of a window, by itself and against an earlier one; exit code 3 when they fail."
    made = verb(verbs, "validate", partial(with_config, _validate), text)
    made.add_argument("config", type=Path, help="YAML file; settings may follow as key=value")
    made.add_argument("--window", choices=["train", "validation", "test"], help="what is judged; the test window if there is one")
    made.add_argument(
        "--baseline",
        default="",
        help="another window, a file of statistics, or the output folder of a training; the training window",
    )
    made.add_argument(
        "--backfilled",
        type=_days,
        metavar="START:END",
        help="days of the training window, or of --window, whose features were back-filled; judged against its other days",
    )
    made.add_argument("--out", type=Path, help="folder for validation.json, validation.html and statistics.json")

    data = verbs.add_parser(
        "data", help="Make, convert or look up data sets.", description="Make, convert or look up data sets."
    ).add_subparsers(required=True, metavar="VERB")
    made = verb(
        data, "simulate", _simulate, "Write an ads log of several days whose truth is known. Settings as key=value, such as num_days=7."
    )
    made.add_argument("--out", type=Path, required=True, help="new folder for the day partitions")
    made = verb(data, "convert", _convert, "Turn a public data set into Parquet files: by day, or into train, validation and test.")
    made.add_argument("dataset", choices=["frappe", "kuairand"])
    made.add_argument("--source", type=Path, required=True, help="folder of the original files")
    made.add_argument("--out", type=Path, required=True, help="new folder for the converted files")

    made = verb(
        data, "vocabulary", partial(with_config, _vocabulary), "Print the vocabulary of a feature's table, from the training window."
    )
    made.add_argument("config", type=Path, help="YAML file; settings may follow as key=value")
    made.add_argument("feature", help="feature, or feature.field of a sequence")
    made.add_argument("--min-count", type=int, default=1, help="leave out ids that occur less often")

    made = verb(
        data, "backfill", _backfill, "Write the data set of a config with the columns of its joins added, so that no later run joins."
    )
    made.add_argument("config", type=Path, help="YAML file; settings may follow as key=value")
    made.add_argument("--out", type=Path, required=True, help="new folder for the data set")

    made = verb(data, "show", _show_dataset, "Tell what a run was trained on; exit code 3 when --verify finds other files now.")
    made.add_argument("name", metavar="RUN", help="output folder, MLflow run id, runs:/ID, models:/NAME@ALIAS or models:/NAME/VERSION")
    made.add_argument("--files", action="store_true", help="list the files with their hashes")
    made.add_argument("--uri", default="", help="where MLflow is, as in tracking.uri")
    beside = made.add_mutually_exclusive_group()
    beside.add_argument("--against", metavar="RUN", default="", help="another run; prints what it read otherwise")
    beside.add_argument("--verify", action="store_true", help="compare the record with the files as they are now")


def _validate(config: ExperimentConfig, options: argparse.Namespace) -> int:
    from mlenv.checks.validation_run import validate

    verdict = validate(config, window=options.window, baseline=options.baseline, backfilled=options.backfilled, out=options.out)
    print(verdict_text(verdict))
    if options.out is not None:
        print(f"page     {options.out / 'validation.html'}")
    return GATE if verdict.severity == "fail" else DONE


def _days(text: str) -> WindowConfig:
    """START:END, both ends included."""
    from mlenv.config import WindowConfig

    start, separator, end = text.partition(":")
    try:
        if start and end and separator:
            return WindowConfig(start=start, end=end)
    except MlenvError:
        pass
    raise argparse.ArgumentTypeError(f"expected START:END, two days as YYYY-MM-DD in order. Received: {text!r}")


def _vocabulary(config: ExperimentConfig, options: argparse.Namespace) -> int:
    from mlenv.composition import to_yaml
    from mlenv.datasets.parquet_source import ParquetSource
    from mlenv.datasets.vocabulary import build_vocabulary, table_columns

    _, columns = table_columns(config.schema, options.feature)
    source = ParquetSource(config.data, config.data.train, config.schema)
    found = build_vocabulary(source.record_batches(columns), config.schema, options.feature, options.min_count)
    print(f"# {len(found.ids):,} of {found.num_distinct:,} ids, {found.occurrence_share:.2%} of the occurrences; the others share one row.")
    table = {"ids": "vocabulary", "num_embeddings": len(found.ids) + 1, "out_of_range": "hash", "vocabulary": list(found.ids)}
    print(to_yaml({"schema": {"tables": {found.table: table}}}), end="")
    return DONE


def _simulate(options: argparse.Namespace) -> int:
    from mlenv.composition import from_plain, parse_overrides, to_yaml
    from mlenv.datasets.simulated_ads import SimulationConfig, simulate

    config = from_plain(parse_overrides(options.overrides), SimulationConfig, "simulation")
    if options.dry_run:
        print(to_yaml(config), end="")
        return DONE
    simulate(config, options.out)
    print(f"wrote {options.out}")
    return DONE


def _convert(options: argparse.Namespace) -> int:
    if options.dry_run:
        print(f"would convert {options.dataset} from {options.source} to {options.out}")
        return DONE
    from mlenv.datasets.frappe import convert_frappe
    from mlenv.datasets.kuairand import convert_kuairand

    convert = {"frappe": convert_frappe, "kuairand": convert_kuairand}[options.dataset]
    convert(options.source, options.out)
    print(f"wrote {options.out}")
    return DONE


def _backfill(options: argparse.Namespace) -> int:
    from mlenv.composition import compose
    from mlenv.datasets.backfill import backfill
    from mlenv.dry_run import check_data

    config = compose(options.config, options.overrides)
    if options.dry_run:
        check_data(config)
        print(f"would write {config.data.path} with the columns of its joins to {options.out}")
        return DONE
    num_rows = backfill(config.data, config.schema, options.out)
    print(f"wrote {num_rows:,} rows to {options.out}")
    return DONE


def _show_dataset(options: argparse.Namespace) -> int:
    if options.dry_run:
        print(f"would show what {options.name} was trained on" + (f", against {options.against}" if options.against else ""))
        return DONE
    from mlenv.records.dataset_record import changes_since, differences, summary
    from mlenv.records.dataset_show import find_record

    record = find_record(options.name, options.uri)
    if options.against:
        found = differences(record, find_record(options.against, options.uri))
        print("\n".join(found) if found else "both read the same")
        return DONE
    print(summary(record, with_files=options.files))
    if not options.verify:
        return DONE
    changes = changes_since(record)
    print("\n".join(changes) if changes else "the files are as they were")
    return GATE if changes else DONE
