"""The command that writes pipelines: ``mlenv ci``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from mlenv.errors import DONE, FAILED


def add_ci_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line; ``verb`` makes one."""
    text = "Pipelines for GitHub Actions, GitLab CI, Jenkins and Buildkite, from the section pipeline of mlenv.yaml."
    group = verbs.add_parser("ci", help=text, description=text).add_subparsers(required=True, metavar="VERB")
    made = verb(
        group, "render", _render, "Write the pipeline of this repo for one of them, or compare what is there; exit code 1 when it differs."
    )
    made.add_argument("--provider", choices=["github", "gitlab", "jenkins", "buildkite"], required=True)
    made.add_argument("--file", type=Path, default=Path("mlenv.yaml"), help="declaration; mlenv.yaml when left out")
    made.add_argument("--out", type=Path, help="file to write; where the provider looks for it when left out")
    made.add_argument("--check", action="store_true", help="write nothing, print the difference")


def _render(options: argparse.Namespace) -> int:
    from mlenv.ci.pipeline import read_pipeline
    from mlenv.ci.providers import PROVIDERS, drift
    from mlenv.pages.page import write_whole

    provider = PROVIDERS[options.provider]
    text = provider.render(read_pipeline(options.file))
    out = options.out or options.file.parent / provider.file
    if options.dry_run:
        print(text, end="")
        return DONE
    if options.check:
        difference = drift(text, out)
        if difference:
            print(f"{difference}\n{out} is not what {options.file} says. Fix: mlenv ci render --provider {options.provider}.")
        return FAILED if difference else DONE
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(text, out)
    print(f"wrote {out}")
    return DONE
