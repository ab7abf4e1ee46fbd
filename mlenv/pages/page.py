"""The look that all pages share: one file without outside links, its style and its tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlenv.errors import ConfigError


@dataclass(frozen=True)
class Cell:
    """One figure of a table."""

    text: str
    notes: Sequence[str] = ()
    """Lines under it, smaller."""
    css: str = ""


@dataclass(frozen=True)
class Table:
    """Names and figures."""

    header: Sequence[str]
    """The first ``num_names`` columns name the row, the others are figures."""
    num_names: int
    rows: Sequence[Sequence[Cell]]


def render(template: str, **values: object) -> str:
    """The page that a template of the package makes of these values."""
    import jinja2

    loader = jinja2.PackageLoader("mlenv", "")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader)
    return environment.get_template(template).render(**values)


def check_out(folder: Path | None) -> None:
    """
    Args:
        folder: of ``--out``; None for none.

    Raises:
        ConfigError: it cannot be made, so that long work would have nowhere to go.
    """
    if folder is not None and (folder.is_file() or not folder.absolute().parent.is_dir()):
        raise ConfigError("--out", expected="a folder whose parent exists", received=str(folder), fix=f"mkdir -p '{folder.parent}'")


def write_whole(text: str, path: Path) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
