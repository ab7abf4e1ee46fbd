"""Choosing a class by its short name: `kind: dcn_v2`, or `kind: my_ranker.model:TowerConfig`.

A table maps each short name to a class, or to the import path of one, so that reading a config imports
only what the config names.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping
from typing import Any

from mlenv.errors import ConfigError, nearest

KindTable = Mapping[str, "type | str"]

_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def kind_field(table: KindTable, *, default_kind: str = "", **options: Any) -> Any:
    """A dataclass field whose class, or whose entries' classes, are chosen by the key ``kind`` from a table.

    Works for ``Thing``, ``Thing | None``, ``tuple[Thing, ...]`` and ``dict[str, Thing]``. ``default_kind`` is what a ``Thing``
    without the key is; without it the key must be there.
    """
    return dataclasses.field(metadata={"kinds": table, "default_kind": default_kind}, **options)


def class_of(kind: object, table: KindTable, key: str) -> type:
    """The class that ``kind`` names.

    Raises:
        ConfigError: the name is in no table, or the import path leads to no dataclass.
    """
    if not isinstance(kind, str) or (kind not in table and ":" not in kind):
        hint = nearest(str(kind), table)
        raise ConfigError(
            f"{key}.kind", expected=f"one of {sorted(table)} or an import path 'package.module:Class'", received=kind, fix=hint
        )
    target = table.get(kind, kind)
    return target if isinstance(target, type) else _import(target, f"{key}.kind")


def kind_of(value: object, table: KindTable) -> str:
    """The short name, or the import path, that leads to the class of a value; the inverse of ``class_of``."""
    path = f"{type(value).__module__}:{type(value).__qualname__}"
    for name, target in table.items():
        if target is type(value) or target == path:
            return name
    return path


def _import(path: str, key: str) -> type:
    if not _IMPORT_PATH.fullmatch(path):
        raise ConfigError(key, expected="an import path 'package.module:Class'", received=path)
    module_name, name = path.split(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            key, expected="an importable class", received=path, fix=f"{error}; run from the root of your repo or install it"
        ) from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ConfigError(key, expected="a dataclass with a build method", received=path)
    return found
