"""The commands of many trainings: ``mlenv tune`` and ``mlenv compare``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from mlenv.errors import DONE


def add_search_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line; ``verb`` makes one."""
    made = verb(verbs, "tune", _tune, "Search for better values of a config's keys, in trials on Ray; go on with a search that was killed.")
    made.add_argument("tuning", type=Path, help="YAML file of the search; settings of it may follow as key=value")

    text = "Say whether two models differ by more than their seeds do: train both with several seeds, or take finished runs."
    made = verb(verbs, "compare", _compare, text)
    for name in ("first", "second"):
        made.add_argument(
            name, help="YAML file, whose settings may follow as key=value; or a folder of finished runs, or a pattern of several"
        )
    made.add_argument("--out", type=Path, required=True, help="folder for the trainings, comparison.html and comparison.json")
    made.add_argument("--seeds", type=int, default=5, help="trainings of each config; more of them may be asked for later")
    made.add_argument("--metric", action="append", default=[], metavar="TASK/METRIC", help="may be given again; AUC, grouped AUC and NE")
    made.add_argument("--paired", action="store_true", help="compare trainings of the same seed with each other")
    made.add_argument("--max-concurrent", type=int, default=2, help="trainings under way at once")
    made.add_argument("--cpus", type=int, default=1, help="CPUs of a training")
    made.add_argument("--gpus", type=float, default=0, help="GPUs of a training")
    made.add_argument("--address", default="", help="Ray cluster to join, auto or host:port; otherwise one is started")


def _tune(options: argparse.Namespace) -> int:
    from mlenv.composition import to_yaml
    from mlenv.studies.tuning import check_search, compose_tuning, tune

    if options.dry_run:
        config = compose_tuning(options.tuning, options.overrides)
        check_search(config)
        print(to_yaml(config), end="")
        return DONE
    result = tune(options.tuning, options.overrides)
    print(f"{len(result.trials)} trials, the best of them {result.best.number}: {result.best.best:.5f}")
    print("\n".join(f"  {key}: {value}" for key, value in result.best.values.items()))
    print(f"config   {result.config}")
    print(f"page     {result.page}")
    if result.tracked_as:
        print(f"MLflow   {result.tracked_as} (mlenv ui)")
    return DONE


def _compare(options: argparse.Namespace) -> int:
    from mlenv.config import ResourcesConfig
    from mlenv.studies.comparison import check_comparison, compare

    wanted = {"out": options.out, "num_seeds": options.seeds, "metrics": options.metric}
    resources = ResourcesConfig(max_concurrent=options.max_concurrent, cpus=options.cpus, gpus=options.gpus, address=options.address)
    if options.dry_run:
        check_comparison(options.first, options.second, options.overrides, **wanted)
        print(f"would compare {options.first} and {options.second} in {options.out}")
        return DONE
    result = compare(options.first, options.second, options.overrides, **wanted, is_paired=options.paired, resources=resources)
    print("\n".join(result.sentences))
    print(f"page     {result.page}")
    if result.tracked_as:
        print(f"MLflow   {result.tracked_as} (mlenv ui)")
    return DONE
