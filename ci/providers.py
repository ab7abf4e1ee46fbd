"""The services that run pipelines, and whether a file in a repo is still what mlenv.yaml says."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mlenv.ci import buildkite, github, gitlab, jenkins
from mlenv.ci.pipeline import Pipeline


@dataclass(frozen=True)
class Provider:
    """One service."""

    file: str
    """Where it looks for its pipeline, from the root of a repo."""
    render: Callable[[Pipeline], str]


PROVIDERS: Final = {
    "github": Provider(github.FILE, github.render),
    "gitlab": Provider(gitlab.FILE, gitlab.render),
    "jenkins": Provider(jenkins.FILE, jenkins.render),
    "buildkite": Provider(buildkite.FILE, buildkite.render),
}


def drift(text: str, file: Path) -> str:
    """The difference between a file and what it should be, as ``diff -u`` writes it; empty when there is none."""
    there = file.read_text(errors="replace") if file.exists() else ""
    lines = difflib.unified_diff(there.splitlines(), text.splitlines(), str(file), f"{file} rendered", lineterm="")
    return "\n".join(lines)
