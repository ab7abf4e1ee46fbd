"""The command that begins a model repo: ``mlenv init``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from mlenv.errors import DONE


def add_model_repo_commands(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]
) -> None:
    """Adds them to the command line; ``verb`` makes one."""
    made = verb(verbs, "init", _init, "Make a model repo: config, schema, model, test, images and pipeline, green from its first commit.")
    made.add_argument("folder", type=Path, metavar="NAME", help="new folder; its name is that of the Python package, such as my_ranker")
    made.add_argument("--provider", default="github", metavar="NAME", help="who runs the pipeline: github, gitlab, jenkins or buildkite")


def _init(options: argparse.Namespace) -> int:
    from mlenv.model_repo import FILES, check_model_repo, make_model_repo

    if options.dry_run:
        check_model_repo(options.folder, options.provider)
        print(f"would write {len(FILES)} files and a pipeline for {options.provider} into {options.folder}")
        return DONE
    for path in make_model_repo(options.folder, options.provider):
        print(f"wrote {options.folder / path}")
    print(f"next: cd {options.folder} && make demo && make test")
    return DONE
