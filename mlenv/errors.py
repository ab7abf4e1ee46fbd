"""Errors that a user can fix: each names the place, the value and the fix."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Self

DONE, FAILED, WRONG_INPUT, GATE = 0, 1, 2, 3
"""Exit codes of the command line: done; failed; wrong usage, config or data; a gate said no."""
STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again. Schedulers can be told to requeue a job on it."""


class MlenvError(ValueError):
    """Base of the errors a user can fix. The command line prints it and ends with exit code 2."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Crosses processes as it is; Exception's own way would call the class with the message alone."""
        return _remade, (type(self), self.args, self.__dict__)


class PlacedError(MlenvError):
    """An error with a place, what was expected there, what was found, and how to mend it."""

    def __init__(self, place: str, *, expected: str, received: object, fix: str = "") -> None:
        self.place, self.expected, self.received, self.fix = place, expected, received, fix
        super().__init__(f"{place}: expected {expected}. Received: {received!r}." + (f" Fix: {fix.rstrip('.')}." if fix else ""))

    def under(self, prefix: str) -> Self:
        """The same error seen from further out: ``num_layers`` becomes ``model.crossing.num_layers``."""
        place = f"{prefix}.{self.place}" if prefix else self.place
        return type(self)(place, expected=self.expected, received=self.received, fix=self.fix)


class ConfigError(PlacedError):
    """A key of the configuration has a value that cannot be used."""


class DataError(PlacedError):
    """A row, a column or a file does not hold what the schema promises."""


class TableError(DataError):
    """A table that is joined cannot be used, whichever rows ask for it."""

    def under(self, prefix: str) -> Self:
        """Itself: the place is the table's."""
        return self


class CheckpointError(PlacedError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class TrainingError(MlenvError):
    """The training itself failed, such as by diverging. The command line ends with exit code 1."""


class ImageError(PlacedError):
    """An image could not be built, tested, moved or run. The command line ends with exit code 1."""


class GateError(MlenvError):
    """What was judged is not good enough. The command line ends with exit code 3."""


class StoppedError(KeyboardInterrupt):
    """A signal asked the process to end: nothing is wrong, and the same command goes on. The command line ends with exit code 75.

    No MlenvError and no Exception, so that nobody on the way takes it for a failure of what he has just tried.
    """


class EarlyStopError(StoppedError):
    """Who was told of an evaluation finds that the training is not worth going on with."""


class Problems(MlenvError):
    """Several errors found in one check, reported together."""

    def __init__(self, title: str, problems: Iterable[MlenvError]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join([f"{title}: {_count(len(self.problems))}.", *(f"  - {problem}" for problem in self.problems)]))


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Says which known name a mistyped one probably meant, or lists the known names."""
    known = sorted(candidates)
    match = difflib.get_close_matches(name, known, n=1)
    if match:
        return f"did you mean {match[0]!r}"
    return f"known names: {', '.join(known)}" if known else "no names are known here"


@contextmanager
def placed_under(prefix: str) -> Iterator[None]:
    """Errors raised inside name their key from further out: ``num_heads`` becomes ``model.crossing.num_heads``."""
    try:
        yield
    except PlacedError as error:
        raise error.under(prefix) from error


def check_at_least(key: str, value: float, least: float) -> None:
    """Raises ConfigError unless the value is finite and not below ``least``."""
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(key, expected=f"a number >= {least}", received=value)


def check_above(key: str, value: float, bound: float) -> None:
    """Raises ConfigError unless the value is finite and above ``bound``."""
    if not (math.isfinite(value) and value > bound):
        raise ConfigError(key, expected=f"a number > {bound}", received=value)


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


def _remade(cls: type[MlenvError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> MlenvError:
    error = cls.__new__(cls, *arguments)
    error.__dict__.update(attributes)
    return error


def _count(number: int) -> str:
    return "1 problem" if number == 1 else f"{number} problems"
