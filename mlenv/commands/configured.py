"""Commands that begin with a config."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlenv.errors import DONE

if TYPE_CHECKING:
    from mlenv.config import ExperimentConfig


def with_config(run: Callable[[ExperimentConfig, argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Composes the config of a command; a dry run shows it and goes no further."""
    from mlenv.composition import compose

    config = compose(options.config, options.overrides)
    return show(config) if options.dry_run else run(config, options)


def in_processes(run: Callable[[ExperimentConfig, argparse.Namespace], int], config: ExperimentConfig, options: argparse.Namespace) -> int:
    """Runs the command here, or in the processes that the config asks for."""
    from mlenv.loops.ranks import started_by_launcher
    from mlenv.loops.stop_signals import end_with_parent

    if started_by_launcher():
        end_with_parent()
        return run(config, options)
    if not config.launch.starts_processes:
        return run(config, options)
    from mlenv.config import Command

    arguments = (options.verb, str(options.config), *options.overrides)
    return config.launch.run(config, Command(arguments, lambda config: run(config, options)))


def show(config: ExperimentConfig) -> int:
    from mlenv.composition import to_yaml
    from mlenv.dry_run import check_data, check_parts

    check_parts(config)
    check_data(config)
    print(to_yaml(config), end="")
    return DONE
