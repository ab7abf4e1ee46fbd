"""The images of a repo: the catalogue's, and those that mlenv.yaml or pyproject.toml declares over them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
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
    catalogue = _located(_read_yaml(CATALOGUE), CATALOGUE.parent)
    own, source = _own(folder)
    nodes = _located(own, folder) | {name: node for name, node in catalogue.items() if name not in own}
    problems: list[MlenvError] = []
    images = {}
    for name in nodes:
        key = f"images.{name}"
        try:
            if not NAME.fullmatch(name):
                raise ConfigError(key, expected="a name of small letters, digits and hyphens", received=name)
            spec: ImageSpec = from_plain(_whole(name, nodes, catalogue, ()), ImageSpec, key)
            images[name] = Declared(name, spec, folder.resolve())
        except Problems as error:
            problems += [_under(key, problem) for problem in error.problems]
        except MlenvError as error:
            problems.append(error)
    if problems:
        raise Problems(str(source), problems)
    return images


def find_image(folder: Path, name: str) -> Declared:
    """One of them.

    Raises:
        ConfigError: there is none of this name.
    """
    images = declared_images(folder)
    if name not in images:
        raise ConfigError("image", expected=f"one that {' or '.join(FILES)} or the catalogue has", received=name, fix=nearest(name, images))
    return images[name]


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


def _whole(name: str, nodes: Mapping[str, Any], catalogue: Mapping[str, Any], seen: tuple[str, ...]) -> dict[str, Any]:
    """An image over all that it extends, key by key. One that extends its own name means the catalogue's."""
    own = dict(nodes[name])
    base = own.pop("extends", None)
    if base is None:
        return own
    if base == name and nodes is not catalogue:
        return _whole(name, catalogue, catalogue, ()) | own if name in catalogue else _no_such(name, base, nodes)
    if base in seen or base == name:
        raise ConfigError(
            f"images.{name}.extends", expected="an image that does not extend itself", received=" -> ".join((*seen, name, base))
        )
    if base not in nodes:
        _no_such(name, base, nodes)
    return _whole(base, nodes, catalogue, (*seen, name)) | own


def _no_such(name: str, base: str, nodes: Mapping[str, Any]) -> dict[str, Any]:
    raise ConfigError(f"images.{name}.extends", expected="another image", received=base, fix=nearest(str(base), nodes))


def _under(key: str, problem: MlenvError) -> MlenvError:
    return problem.under(key) if isinstance(problem, ConfigError) else problem
