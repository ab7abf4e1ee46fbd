"""From YAML and overrides to one typed config, and back: defaults <- file with all it extends <- ``key=value``."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mlenv.config import DaysConfig, ExperimentConfig, check
from mlenv.errors import ConfigError, MlenvError, PlacedError, Problems, nearest, placed_under
from mlenv.kinds import KindTable, class_of, kind_of

Node = dict[str, Any]

_KIND = re.compile(r"[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?")
"""A short name or an import path."""

_DEFAULT_KINDS = {
    item.name: item.metadata["default_kind"] for item in dataclasses.fields(ExperimentConfig) if "default_kind" in item.metadata
}
"""Kinds of the sections that need not name theirs."""


def compose(file: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Merges defaults, a YAML file with all it extends, and ``key=value`` overrides into one validated config.

    A later file wins key by key; lists are replaced; ``name: null`` takes an entry out; a changed ``kind`` starts afresh. A bare
    name stands for its kind: ``optimizer=lion`` for ``optimizer.kind=lion``.

    Raises:
        Problems: names every unknown key, wrong value and contradiction at once.
        ConfigError: a file is missing, is not YAML, or extends itself.
    """
    plain = _with_windows(load(file, overrides), str(file))
    config: ExperimentConfig = from_plain(plain, ExperimentConfig, str(file))
    check(config)
    return config


def load(file: str | Path, overrides: Sequence[str] = ()) -> Node:
    """A YAML file with all it extends and ``key=value`` overrides, merged but not yet looked at.

    Raises:
        ConfigError: a file is missing, is not YAML, or extends itself.
    """
    plain = _merge(_load(Path(file), ()), parse_overrides(overrides), _DEFAULT_KINDS)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(plain), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(file), expected="interpolations that resolve", received=str(error).splitlines()[0]) from error
    return typing.cast(Node, resolved)


def from_plain(plain: Node, cls: type, title: str = "config") -> Any:
    """Builds a dataclass, and all dataclasses inside it, from plain dicts and lists.

    Raises:
        Problems: names every unknown or missing key and every value of the wrong type at once.
    """
    problems: list[MlenvError] = []
    built = _build(cls, plain, "", problems)
    if problems:
        raise Problems(title, problems)
    return built


def leaves(node: Any, key: str = "") -> dict[str, Any]:
    """What nested mappings hold, by dotted key."""
    if not isinstance(node, dict):
        return {key: node}
    return {name: value for part, entry in node.items() for name, value in leaves(entry, f"{key}.{part}" if key else part).items()}


def to_plain(value: object, table: KindTable | None = None) -> Any:
    """Turns a config back into the dicts and lists that ``from_plain`` takes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        head = {"kind": kind_of(value, table)} if table is not None else {}
        return head | {item.name: to_plain(getattr(value, item.name), item.metadata.get("kinds")) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(entry, table) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(entry, table) for entry in value]
    return value


def to_yaml(config: object) -> str:
    """The whole config, defaults included, as YAML that composes to the same config."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def _load(file: Path, seen: tuple[Path, ...]) -> Node:
    """Reads a YAML file over the files it extends, whose paths are relative to it."""
    if file.resolve() in seen:
        raise ConfigError(str(file), expected="a file that does not extend itself", received=" -> ".join(map(str, (*seen, file))))
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except OSError as error:
        raise ConfigError(str(file), expected="a readable YAML file", received=error.strerror or str(error)) from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(str(file), expected="YAML", received=" ".join(str(error).split())) from error
    if not isinstance(loaded, dict):
        raise ConfigError(str(file), expected="a mapping of keys", received=type(loaded).__name__)
    extends = loaded.pop("extends", [])
    bases = [extends] if isinstance(extends, str) else extends
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ConfigError(f"{file}: extends", expected="a file, or a list of files", received=extends)
    merged: Node = {}
    for base in bases:
        merged = _merge(merged, _load(file.parent / base, (*seen, file.resolve())), _DEFAULT_KINDS)
    return _merge(merged, typing.cast(Node, loaded), _DEFAULT_KINDS)


def parse_overrides(overrides: Sequence[str]) -> Node:
    """``a.b=1`` as nested mappings. A word beside keys below its own is a kind: ``launch=ray launch.num_processes=4``, in any order.

    Raises:
        ConfigError: a word is no ``key=value``.
    """
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise ConfigError(override, expected="key=value", received=override)
    keys = [override.partition("=")[0] for override in overrides]
    words = [
        f"{key}.kind={value}"
        if _KIND.fullmatch(value) and value != "null" and any(other.startswith(f"{key}.") for other in keys)
        else f"{key}={value}"
        for key, _, value in (override.partition("=") for override in overrides)
    ]
    try:
        return typing.cast(Node, OmegaConf.to_container(OmegaConf.from_dotlist(words)))
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, LookupError) as error:
        raise ConfigError(" ".join(overrides), expected="overrides as key=value", received=" ".join(str(error).split())) from error


def _with_windows(plain: Node, title: str) -> Node:
    """Puts the windows that ``data.days`` describes in its place, so that everybody sees days and no lengths.

    Raises:
        Problems: a key of ``data.days`` is wrong, or a window is given as well.
    """
    data = plain.get("data")
    if not isinstance(data, dict) or "days" not in data:
        return plain
    rest = {key: value for key, value in data.items() if key != "days"}
    if data["days"] is None:
        return {**plain, "data": rest}
    problems: list[MlenvError] = []
    days: DaysConfig | None = _build(DaysConfig, data["days"], "data.days", problems)
    for name in (name for name in ("train", "validation", "test") if rest.get(name) is not None):
        fix = f"set data.{name} to null, or data.days"
        problems.append(ConfigError(f"data.{name}", expected="nothing beside data.days", received=rest[name], fix=fix))
    waiting = _value(int, rest.get("label_wait_days", 0), "data.label_wait_days", None, problems)
    if problems or days is None:
        raise Problems(title, problems)
    with placed_under("data.days"):
        return {**plain, "data": rest | {name: to_plain(window) for name, window in days.windows(waiting).items()}}


def _merge(base: Node, top: Node, default_kinds: Mapping[str, str]) -> Node:
    """Deep merge; a node whose kind changes starts afresh, because the keys of one class mean nothing to another.

    A text where the other side has a mapping is a kind: ``launch: ray`` is ``launch: {kind: ray}``.
    """
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, str):
            below = {"kind": below}
        if isinstance(value, str) and isinstance(below, dict) and value == below.get("kind", default_kinds.get(key)):
            continue
        if isinstance(value, dict) and isinstance(below, dict) and _is_same_kind(below, value, default_kinds.get(key)):
            merged[key] = _merge(below, value, {})
        else:
            merged[key] = value
    return merged


def _is_same_kind(below: Node, value: Node, default: str | None) -> bool:
    return "kind" not in value or value["kind"] == below.get("kind", default)


def _build(cls: type, node: object, key: str, problems: list[MlenvError]) -> Any:
    """Builds one dataclass; what is wrong below it is added to ``problems`` and gives None."""
    if not isinstance(node, Mapping):
        problems.append(ConfigError(key or "config", expected=f"the keys of {cls.__name__}", received=node))
        return None
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls) if item.init}
    before = len(problems)
    for name in node.keys() - fields.keys():
        problems.append(
            ConfigError(_join(key, str(name)), expected=f"a key of {cls.__name__}", received=node[name], fix=nearest(str(name), fields))
        )
    values = {}
    for name, item in fields.items():
        if name in node:
            entry = node[name]
            if item.metadata.get("default_kind") and isinstance(entry, Mapping):
                entry = {"kind": item.metadata["default_kind"], **entry}
            values[name] = _value(hints[name], entry, _join(key, name), item.metadata.get("kinds"), problems)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            problems.append(
                ConfigError(_join(key, name), expected="a value, it has no default", received="nothing", fix=f"set {_join(key, name)}")
            )
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except Problems as error:
        problems += [problem.under(key) if isinstance(problem, PlacedError) else problem for problem in error.problems]
    except PlacedError as error:
        problems.append(error.under(key))
    return None


def _value(hint: Any, value: object, key: str, table: KindTable | None, problems: list[MlenvError]) -> Any:
    """Converts one value to the type of its field: a dataclass, a collection of dataclasses, or a leaf."""
    inner, optional = _strip_none(hint)
    if value is None and optional:
        return None
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is dict and _holds_dataclass(arguments[1], table):
        if not isinstance(value, Mapping):
            problems.append(ConfigError(key, expected="a mapping of names", received=value))
            return None
        return {
            str(name): _one(arguments[1], entry, _join(key, str(name)), table, problems)
            for name, entry in value.items()
            if entry is not None
        }
    if origin is tuple and _holds_dataclass(arguments[0], table):
        if not isinstance(value, list):
            problems.append(ConfigError(key, expected="a list", received=value))
            return None
        return tuple(_one(arguments[0], entry, f"{key}[{place}]", table, problems) for place, entry in enumerate(value))
    if _holds_dataclass(inner, table):
        return _one(inner, value, key, table, problems)
    return _leaf(inner, value, key, problems)


def _one(hint: Any, value: object, key: str, table: KindTable | None, problems: list[MlenvError]) -> Any:
    if table is None:
        return _build(hint, value, key, problems)
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping):
        problems.append(ConfigError(key, expected=f"a mapping with a kind, one of {sorted(table)}", received=value))
        return None
    try:
        cls = class_of(value.get("kind"), table, key)
    except ConfigError as error:
        problems.append(error)
        return None
    return _build(cls, {name: entry for name, entry in value.items() if name != "kind"}, key, problems)


def _leaf(hint: Any, value: object, key: str, problems: list[MlenvError]) -> Any:
    """OmegaConf converts and checks leaves: "3" is an integer, 2.5 is not, a Literal takes its own values only."""
    texts = value if isinstance(value, list) and hint == tuple[str, ...] else [value] if hint is str else []
    for text in (text for text in texts if isinstance(text, (bool, float))):  # YAML reads NO and 1e5 so; the word is lost by now
        problems.append(ConfigError(key, expected="text", received=text, fix="put the word in quotes"))
        return None
    holder = OmegaConf.structured(dataclasses.make_dataclass("Leaf", [("value", hint)]))
    try:
        return OmegaConf.to_container(OmegaConf.merge(holder, {"value": value}))["value"]  # type: ignore[index, call-overload]
    except (OmegaConfBaseException, TypeError, ValueError):
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        name = str(hint) if typing.get_origin(hint) else hint.__name__
        expected = f"one of {list(choices)}" if choices else f"a value of type {name}"
        problems.append(
            ConfigError(key, expected=expected, received=value, fix=nearest(value, choices) if isinstance(value, str) and choices else "")
        )
        return None


def _strip_none(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        rest = [argument for argument in typing.get_args(hint) if argument is not type(None)]
        return (rest[0] if len(rest) == 1 else hint), len(rest) < len(typing.get_args(hint))
    return hint, False


def _holds_dataclass(hint: Any, table: KindTable | None) -> bool:
    return table is not None or dataclasses.is_dataclass(hint)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
