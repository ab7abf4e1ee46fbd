"""A new model repo: config, schema, model, test, images and pipeline, green from its first commit."""

from __future__ import annotations

import keyword
import re
import shlex
import shutil
import sys
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from string import Template
from typing import Final

from mlenv.ci.pipeline import FILE, read_pipeline
from mlenv.ci.providers import PROVIDERS
from mlenv.errors import ConfigError, DataError, nearest

TEMPLATES: Final = Path(__file__).parent / "repo_template"

FILES: Final = {
    "README.md": "README.md",
    "Makefile": "Makefile",
    "schema.yaml": "schema.yaml",
    "config.yaml": "config.yaml",
    "mlenv.yaml": FILE,
    "pyproject.toml": "pyproject.toml",
    "requirements.txt": "requirements.txt",
    "gitignore": ".gitignore",
    "pre-commit-config.yaml": ".pre-commit-config.yaml",
    "model.py": "$name/model.py",
    "test_model.py": "tests/test_model.py",
}
"""Templates, whose names end in ``.template``, and the files that they become."""

_NAME: Final = re.compile("[a-z][a-z0-9_]*")
_TAKEN: Final = frozenset({"mlenv", "tests", "work"})
"""What the repo imports, and its other folders."""


def make_model_repo(folder: Path, provider: str = "github") -> list[Path]:
    """Writes the repo, whole or not at all.

    Args:
        folder: new, or empty; its name becomes that of the package and of the registered model.
        provider: one of PROVIDERS, whose pipeline is written.

    Returns:
        The files, relative to the folder.

    Raises:
        ConfigError: the name is no name of a package, or one that another package has; the provider is not known.
        DataError: the folder holds something.
    """
    check_model_repo(folder, provider)
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        written = _write(temporary, folder.name, provider)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def check_model_repo(folder: Path, provider: str) -> None:
    """See make_model_repo."""
    name = folder.name
    if provider not in PROVIDERS:
        raise ConfigError("--provider", expected="a service that runs pipelines", received=provider, fix=nearest(provider, PROVIDERS))
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        suggested = re.sub("[^a-z0-9]+", "_", name.lower()).strip("_0123456789")
        fix = f"name it {suggested}" if _NAME.fullmatch(suggested) and not keyword.iskeyword(suggested) else "name it my_ranker"
        raise ConfigError("NAME", expected="a name for a Python package: small letters, digits and _", received=name, fix=fix)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(str(folder), expected="a new or an empty folder", received="one that holds files", fix="choose another name")
    if not folder.absolute().parent.is_dir():
        fix = f"mkdir -p {shlex.quote(str(folder.parent))}"
        raise DataError(str(folder), expected="a folder whose parent exists", received=str(folder.parent), fix=fix)
    if name in _TAKEN or name in sys.stdlib_module_names or _is_installed(name):
        expected = "a name that no other package has"
        raise ConfigError("NAME", expected=expected, received=name, fix=f"name it {name}_ranker: two packages of one name hide each other")


def _is_installed(name: str) -> bool:
    """Whether a package of this name is installed; one in the current folder is none."""
    return PathFinder.find_spec(name, [place for place in sys.path if place.endswith(("site-packages", "dist-packages"))]) is not None


def _write(folder: Path, name: str, provider: str) -> list[Path]:
    values = {"name": name, "provider": provider, "pipeline_file": PROVIDERS[provider].file, "version": metadata.version("mlenv")}
    texts = {Template(path).substitute(values): (TEMPLATES / f"{template}.template").read_text() for template, path in FILES.items()}
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(Template(text).substitute(values))
    (folder / name / "__init__.py").write_text("")
    pipeline = folder / PROVIDERS[provider].file
    pipeline.parent.mkdir(parents=True, exist_ok=True)
    pipeline.write_text(PROVIDERS[provider].render(read_pipeline(folder / FILE)))
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
