"""YAML as a person would write it: keys in their order, shell scripts as blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block, and repeats what is the same instead of pointing to it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def yaml_text(document: dict[str, Any], comments: Iterable[str]) -> str:
    """The document under its comments."""
    body = yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=200, allow_unicode=True)
    return "".join(f"# {line}\n" for line in comments) + body


def without_empty(entries: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what is not set."""
    return {key: value for key, value in entries.items() if value not in (None, "", [], {})}
