"""The images of a repo: the catalogue's, and those that mlenv.yaml or pyproject.toml declares over them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from mlenv.composition import from_plain
from mlenv.errors import ConfigError, MlenvError, Problems, nearest
from mlenv.images.spec import NAME, ImageSpec

CATALOGUE: Final = Path(__file__).parent / "catalogue.yaml"
FILES: Final = ("mlenv.yaml", "pyproject.toml")
_PATHS: Final = ("lock", "wheels", "mlenv")
"""Keys whose path belongs to the file that sets them, wherever it is extended."""


@dataclass(frozen=True)
class Declared:
    """An image with a name, and the folder its ``files`` lie in."""

    name: str
    spec: ImageSpec
    folder: Path


def declared_images(folder: Path) -> dict[str, Declared]:
    """All images that a repo can build, by name: its own first, then the catalogue's.

    Raises:
        ConfigError: a file is no YAML or TOML, or an image extends what is not there.
        Problems: names every wrong key and value of all images.
    """
    own, source = _own(folder)
    catalogue = _catalogue()
    specs = _specs(own, _located(own, folder) | {name: node for name, node in catalogue.items() if name not in own}, str(source))
    specs |= {name: spec for name, spec in _catalogue_specs().items() if name not in own}
    return {name: Declared(name, spec, folder.resolve()) for name, spec in specs.items()}


def find_image(folder: Path, name: str) -> Declared:
    """One of them.

    Raises:
        ConfigError: there is none of this name.
    """
    images = declared_images(folder)
    if name not in images:
        raise ConfigError("image", expected=f"one that {' or '.join(FILES)} or the catalogue has", received=name, fix=nearest(name, images))
    return images[name]


@cache
def _catalogue() -> dict[str, Any]:
    return _located(_read_yaml(CATALOGUE), CATALOGUE.parent)


@cache
def _catalogue_specs() -> dict[str, ImageSpec]:
    return _specs(_catalogue(), _catalogue(), str(CATALOGUE))


def _specs(names: Iterable[str], nodes: Mapping[str, Any], title: str) -> dict[str, ImageSpec]:
    """The images of these names; ``nodes`` has all that they may extend."""
    problems: list[MlenvError] = []
    specs = {}
    for name in names:
        key = f"images.{name}"
        try:
            if not NAME.fullmatch(name):
                raise ConfigError(key, expected="a name of small letters, digits and hyphens", received=name)
            specs[name] = from_plain(_whole(name, nodes, ()), ImageSpec, key)
        except Problems as error:
            problems += [problem.under(key) if isinstance(problem, ConfigError) else problem for problem in error.problems]
        except MlenvError as error:
            problems.append(error)
    if problems:
        raise Problems(title, problems)
    return specs


def _own(folder: Path) -> tuple[dict[str, Any], Path]:
    """What the repo declares, and where; in one file, not in two."""
    first, second = (folder / name for name in FILES)
    found = {file: node for file, node in ((first, _read_yaml(first).get("images")), (second, _read_toml(second))) if node}
    if len(found) > 1:
        raise ConfigError(str(second), expected=f"images in {first.name} or in {second.name}", received="both", fix="keep one of them")
    for file, node in found.items():
        if not isinstance(node, dict) or not all(isinstance(entry, dict) for entry in node.values()):
            raise ConfigError(f"{file}: images", expected="a mapping of names to images", received=node)
        return node, file
    return {}, first if first.exists() else CATALOGUE


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        node = yaml.safe_load(file.read_text()) or {}
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(str(file), expected="YAML", received=" ".join(str(error).split())) from error
    if not isinstance(node, dict):
        raise ConfigError(str(file), expected="a mapping of keys", received=type(node).__name__)
    return node


def _read_toml(file: Path) -> Any:
    try:
        return tomllib.loads(file.read_text()).get("tool", {}).get("mlenv", {}).get("images", {})
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(str(file), expected="TOML", received=str(error)) from error


def _located(nodes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Paths as seen from anywhere. ``mlenv`` is one only if it looks like one: it may be a version."""

    def place(key: str, value: Any) -> Any:
        is_path = key in _PATHS and isinstance(value, str) and value and (key != "mlenv" or "/" in value or value in (".", ".."))
        return str((folder / value).resolve()) if is_path else value

    return {name: {key: place(key, value) for key, value in node.items()} for name, node in nodes.items()}


def _whole(name: str, nodes: Mapping[str, Any], seen: tuple[str, ...]) -> dict[str, Any]:
    """An image over all that it extends, key by key. One that extends its own name means the catalogue's."""
    own = dict(nodes[name])
    base = own.pop("extends", None)
    if base is None:
        return own
    key = f"images.{name}.extends"
    catalogue = _catalogue()
    if base == name and name in catalogue and nodes is not catalogue:
        return _whole(name, catalogue, ()) | own
    if base in seen or base == name:
        raise ConfigError(key, expected="an image that does not extend itself", received=" -> ".join((*seen, name, base)))
    if base not in nodes:
        raise ConfigError(key, expected="another image", received=base, fix=nearest(str(base), nodes))
    return _whole(base, nodes, (*seen, name)) | own
