"""The commands about trainings that a scheduler starts: ``mlenv job``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mlenv.errors import DONE


def add_job_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line; ``verb`` makes one."""
    text = "Let Kubernetes, Slurm or a Ray cluster start a training."
    group = verbs.add_parser("job", help=text, description=text).add_subparsers(required=True, metavar="VERB")
    made = verb(group, "render", _render_job, "Write the job down, for kubectl apply or sbatch.")
    made.add_argument("config", type=Path, help="YAML file, as the job finds it; settings may follow as key=value")
    made.add_argument("--kind", choices=["rayjob", "pytorchjob", "slurm"], required=True)
    made.add_argument("--out", type=Path, required=True, help="file to write")
    made = verb(group, "submit", _submit_job, "Send this folder to a Ray cluster and start the training there.")
    made.add_argument("config", type=Path, help="YAML file in this folder; settings may follow as key=value")
    made.add_argument("--address", required=True, help="of the cluster's dashboard, such as http://HEAD:8265")
    made.add_argument("--follow", action="store_true", help="print what the job says until it ends; exit code 1 when it fails")


def _render_job(options: argparse.Namespace) -> int:
    from mlenv.composition import compose
    from mlenv.launching.job_manifests import render
    from mlenv.pages.page import write_whole

    config = compose(options.config, options.overrides)
    text = render(config, options.kind, ["train", str(options.config), *options.overrides])
    if options.dry_run:
        print(text, end="")
        return DONE
    write_whole(text, options.out)
    print(f"wrote {options.out}: {'sbatch' if options.kind == 'slurm' else 'kubectl apply -f'} {options.out}")
    return DONE


def _submit_job(options: argparse.Namespace) -> int:
    from mlenv.composition import compose
    from mlenv.launching.job_submit import check_job, follow, submit

    config = compose(options.config, options.overrides)
    check_job(config)
    if options.dry_run:
        print(f"would send {os.getcwd()} to {options.address} and train {options.config} there")
        return DONE
    job = submit(config, ["train", str(options.config), *options.overrides], options.address)
    print(job, flush=True)
    return follow(job, options.address, partial(print, end="", flush=True)) if options.follow else DONE
