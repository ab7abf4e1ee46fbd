"""The layout of DESIGN: who may import whom, what stays light, what files are called."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("mlenv", "modules", "datasets", "loops", "images", "ci", "examples", "benchmarks", "docs", "requirements", "tests")

LEVELS = {
    **dict.fromkeys(("errors", "kinds", "schema", "config", "composition"), 0),
    **dict.fromkeys(("batch", "transforms", "statistics"), 1),
    **dict.fromkeys(("modules", "datasets"), 2),
    "loops": 3,
    **dict.fromkeys(("__init__", "__main__", "cli", "commands"), 5),
}
"""Parts of mlenv from low to high. A part imports from lower levels and its own; modules and datasets never see each other."""
SERVICES = 4
"""Tracking, registry, gates, workflows, reports: the level of every part that is not named above."""

HEAVY = {"torch", "torchrec", "ray", "mlflow", "lightning", "matplotlib", "docker", "pandas", "sklearn"}

SOURCES = sorted(path for folder in ("mlenv", "modules", "datasets", "loops", "images", "ci") for path in (ROOT / folder).rglob("*.py"))
"""Each source once: rglob does not enter the linked folders."""
PARTS = {path.stem for path in (ROOT / "mlenv").iterdir() if path.suffix == ".py" or path.is_dir()}


def part_of(source: Path) -> str:
    """mlenv/batch.py is batch; modules/cross_net.py is modules."""
    parts = source.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "mlenv" else parts[0]


def imported_parts(code: str) -> Iterator[str]:
    """Parts of mlenv that a source imports anywhere, for types only too. A name of mlenv itself counts as ``__init__``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "mlenv":
            names = [f"mlenv.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "mlenv":
                yield rest[0] if rest and rest[0] in PARTS else "__init__"


def may_import(part: str, other: str) -> bool:
    return {part, other} != {"modules", "datasets"} and LEVELS.get(other, SERVICES) <= LEVELS.get(part, SERVICES)


def test_imported_parts_are_found_wherever_they_are_written() -> None:
    code = """
from typing import TYPE_CHECKING
import mlenv.schema
from mlenv import loops
if TYPE_CHECKING:
    from mlenv.datasets.hashing import hash_ids
def late():
    from mlenv import fit
PATH = "mlenv.batch:Batch"
"""
    assert sorted(imported_parts(code)) == ["__init__", "datasets", "loops", "schema"]


@pytest.mark.parametrize(
    ("part", "other", "allowed"),
    [
        ("modules", "datasets", False),
        ("datasets", "modules", False),
        ("schema", "batch", False),
        ("loops", "tracking", False),
        ("batch", "__init__", False),
        ("config", "schema", True),
        ("loops", "datasets", True),
        ("report", "tracking", True),
        ("cli", "__init__", True),
    ],
)
def test_direction_of_imports(part: str, other: str, allowed: bool) -> None:
    assert may_import(part, other) is allowed


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_from_below(source: Path) -> None:
    part = part_of(source)
    wrong = sorted({other for other in imported_parts(source.read_text()) if not may_import(part, other)})
    assert not wrong, f"{part} must not import {wrong}"


@pytest.mark.parametrize("arguments", [("-c", "import mlenv"), ("-m", "mlenv", "--help")], ids=" ".join)
def test_start_is_light(arguments: tuple[str, ...]) -> None:
    loaded = {module.split(".")[0] for module in modules_loaded_by(*arguments)}
    assert "mlenv" in loaded
    assert not loaded & HEAVY


def test_a_dry_run_loads_torch_and_little_else() -> None:
    loaded = modules_loaded_by("-c", "import mlenv.dry_run")
    assert "torch" in loaded
    heavy = (HEAVY - {"torch"}) | {"torchmetrics", "torch.distributed.checkpoint", "torch._dynamo"}
    assert not loaded & heavy


def modules_loaded_by(*arguments: str) -> set[str]:
    command = [sys.executable, "-X", "importtime", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr.splitlines()[-1]
    lines = [line for line in process.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip() for line in lines}


def test_files_have_telling_names() -> None:
    vague = {"utils", "util", "common", "misc", "helpers"}
    assert not [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.stem in vague]


def test_links_lead_somewhere_inside_the_repo() -> None:
    links = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_symlink()]
    assert {link.relative_to(ROOT).as_posix() for link in links} >= {"mlenv/modules", "mlenv/datasets", "mlenv/loops"}
    for link in links:
        assert not os.readlink(link).startswith("/"), f"{link} must be relative"
        assert link.resolve(strict=True).is_relative_to(ROOT)
