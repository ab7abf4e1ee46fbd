"""A run's own record of its numbers: one JSON line per logged step."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Final

from mlenv.errors import DataError

logger = logging.getLogger(__name__)

JOURNAL_FILE: Final = "metrics.jsonl"

_BLOCK_BYTES: Final = 1 << 20
_NON_FINITE: Final = frozenset({"nan", "inf", "-inf"})


class Journal:
    """Writes ``{"step": 100, "time": 1767225600.0, "train/click/loss": 0.52, ...}``, one line at a time, in order of steps.

    The file is the truth: a tracking server is told what is in it. A process killed while it writes leaves half a line,
    which readers pass over and the next write removes. JSON has no word for numbers that are not finite, so they are
    kept as ``"nan"``, ``"inf"`` and ``"-inf"``.

    A disk that is full does not stop the training: lines wait in memory until one can be written again, or ``sync`` must know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one step's numbers; when it returns, they outlive the process unless the disk is full, and after ``sync`` the machine."""
        assert not {"step", "time"} & values.keys(), "the journal itself writes these"
        line = {"step": step, "time": time.time()} | {key: _to_json(float(value)) for key, value in values.items()}
        self._waiting.append(json.dumps(line, allow_nan=False).encode() + b"\n")
        try:
            self._write()
        except OSError as error:
            if len(self._waiting) == 1:
                logger.warning("%s: cannot be written (%s). Its lines wait in memory.", self.path, error)

    def sync(self) -> None:
        """Waits until what was appended is on the disk.

        Raises:
            OSError: it cannot be written.
        """
        self._write()
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _write(self) -> None:
        while self._waiting:
            with self.path.open("a+b") as file:
                _drop_half_line(file)
                file.write(self._waiting[0])
            del self._waiting[0]

    def truncate(self, step: int) -> None:
        """Drops the lines after a step: a run that resumes from its checkpoint writes those steps again."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            kept = [line for number, line in enumerate(_whole_lines(file), start=1) if _parse(line, self.path, number)["step"] <= step]
        temporary = self.path.with_name(f".{self.path.name}.part")
        with temporary.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def read(self) -> list[dict[str, float]]:
        """All whole lines, in the order in which they were written; none when there is no file.

        Raises:
            DataError: a line other than a half-written last one is broken.
        """
        follower = JournalFollower(self.path)
        return [line for block in iter(follower.read, []) for line in block]


class SilentJournal:
    """The journal of the processes that are not rank 0: it takes everything and keeps nothing."""

    def append(self, step: int, values: Mapping[str, float]) -> None: ...

    def sync(self) -> None: ...

    def truncate(self, step: int) -> None: ...


class JournalFollower:
    """Reads what was added to a journal since the last read; starts again when the journal was truncated."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._offset = 0
        self._number = 0

    def read(self) -> list[dict[str, float]]:
        """The next whole lines, about a megabyte of them; none when there are no more yet."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            inode = os.fstat(file.fileno()).st_ino  # truncating puts another file in this place
            if inode != self._inode:
                self._inode, self._offset, self._number = inode, 0, 0
            file.seek(self._offset)
            lines = _whole_lines(file, _BLOCK_BYTES)
        parsed = [_parse(line, self._path, number) for number, line in enumerate(lines, start=self._number + 1)]
        self._offset += sum(map(len, lines))
        self._number += len(lines)
        return parsed


def _whole_lines(file: BinaryIO, about_bytes: int = -1) -> list[bytes]:
    return [line for line in file.readlines(about_bytes) if line.endswith(b"\n")]


def _drop_half_line(file: BinaryIO) -> None:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(end - 1, 0))
    if file.read(1) not in (b"", b"\n"):
        file.seek(0)
        file.truncate(sum(map(len, _whole_lines(file))))


def _parse(line: bytes, path: Path, number: int) -> dict[str, float]:
    try:
        parsed = {key: _from_json(value) for key, value in json.loads(line).items()}
        if not (isinstance(parsed["step"], int) and math.isfinite(parsed["time"])):
            raise TypeError("'step' or 'time'")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(
            f"{path}, line {number}",
            expected="a JSON object of numbers with a whole 'step' and a 'time'",
            received=line[:200].decode(errors="replace").rstrip(),
            fix="remove the line",
        ) from error
    return parsed


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _from_json(value: object) -> float:
    if isinstance(value, str) and value in _NON_FINITE:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value
