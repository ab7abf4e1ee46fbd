"""Errors that a user can fix: each names the place, the value and the fix."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class MlenvError(ValueError):
    """Base of the errors a user can fix. The command line prints it and ends with exit code 2."""


class ConfigError(MlenvError):
    """A key of the configuration has a value that cannot be used."""

    def __init__(self, key: str, *, expected: str, received: object, fix: str = "") -> None:
        super().__init__(_sentence(key, expected, received, fix))


class DataError(MlenvError):
    """A row, a column or a file does not hold what the schema promises."""

    def __init__(self, place: str, *, expected: str, received: object, fix: str = "") -> None:
        super().__init__(_sentence(place, expected, received, fix))


class CheckpointError(MlenvError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    def __init__(self, place: str, *, expected: str, received: object, fix: str = "") -> None:
        super().__init__(_sentence(place, expected, received, fix))


class Problems(MlenvError):
    """Several errors found in one check, reported together."""

    def __init__(self, title: str, problems: Iterable[MlenvError | str]) -> None:
        self.problems = [str(problem) for problem in problems]
        super().__init__("\n".join([f"{title}: {_count(len(self.problems))}.", *(f"  - {problem}" for problem in self.problems)]))


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Says which known name a mistyped one probably meant, or lists the known names."""
    known = sorted(candidates)
    match = difflib.get_close_matches(name, known, n=1)
    if match:
        return f"did you mean {match[0]!r}?"
    return f"known names: {', '.join(known)}" if known else "no names are known here"


def require(module: str, *, extra: str) -> ModuleType:
    """Imports an optional dependency or says how to get it.

    Raises:
        MlenvError: the module is missing, or a native library in it was built for another torch.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, AttributeError) as error:  # OSError, AttributeError: built for another torch
        raise MlenvError(
            f"{module}: cannot be imported ({type(error).__name__}: {error}). "
            f"Fix: pip install 'mlenv[{extra}]', or the full lock with pip install --no-deps -r requirements/cpu.txt."
        ) from error


def _sentence(place: str, expected: str, received: object, fix: str) -> str:
    return f"{place}: expected {expected}. Received: {received!r}." + (f" Fix: {fix}." if fix else "")


def _count(number: int) -> str:
    return "1 problem" if number == 1 else f"{number} problems"
