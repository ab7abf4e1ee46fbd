"""What ``mlenv doctor`` finds about one thing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

Severity = Literal["pass", "warn", "fail"]

NOT_LOADED: Final = (ImportError, OSError, AttributeError, RuntimeError)
"""What the import of a package raises whose native library was built for another torch."""


@dataclass(frozen=True)
class Condition:
    """One thing that was looked at."""

    subject: str
    severity: Severity
    found: str
    fix: str = ""


def is_fine(conditions: Iterable[Condition]) -> bool:
    """Whether nothing is wrong; a warning is not."""
    return all(condition.severity != "fail" for condition in conditions)
