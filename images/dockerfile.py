"""An image's declaration and its files as a Dockerfile that people can read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Final

from mlenv.images.compatibility import cuda_of
from mlenv.images.spec import ImageSpec

PACKAGES: Final = "packages.txt"
"""The lock and what is installed beside it; in the context of the build."""
MLENV, WHEELS, FILES = "mlenv", "wheels", "files"
"""Folders of the context: mlenv's wheel, the wheels that are not downloaded, files of the model repo."""


def render(name: str, spec: ImageSpec, contents: Collection[str], pinned: Mapping[str, str]) -> str:
    """The Dockerfile.

    Args:
        contents: paths of the files in the context.
        pinned: versions by package.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("mlenv", "images")
    # Not HTML: what is escaped here is a shell's and Docker's, and the spec lets no such letters in.
    pages = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    wheel = next((path for path in contents if path.startswith(f"{MLENV}/")), "")
    text = pages.get_template("Dockerfile.j2").render(
        name=name,
        spec=spec,
        has_packages=PACKAGES in contents,
        has_wheels=any(path.startswith(f"{WHEELS}/") for path in contents),
        has_files=any(path.startswith(f"{FILES}/") for path in contents),
        mlenv_wheel=wheel.removeprefix(f"{MLENV}/"),
        cuda=cuda_of(pinned) if spec.accelerator == "cuda" else "",
        pairs=_pairs,
    )
    return "\n".join(_without_double_blanks(text.splitlines())) + "\n"


def _pairs(values: Mapping[str, str]) -> str:
    """``A="b" C="d"``, quoted so that Docker takes them as they are: a dollar sign is no variable."""
    return " ".join(f"{key}={json.dumps(value, ensure_ascii=False).replace('$', chr(92) + '$')}" for key, value in sorted(values.items()))


def _without_double_blanks(lines: list[str]) -> list[str]:
    return [line for place, line in enumerate(lines) if line or (place > 0 and lines[place - 1])]
