"""Notices a training in which nothing goes on any more."""

from __future__ import annotations

import faulthandler
import logging
import threading
import time
from pathlib import Path
from typing import IO, Final

from mlenv.loops.ranks import rank

logger = logging.getLogger(__name__)

_POLLS: Final = 10
"""Times within a timeout that the thread looks."""


class Watchdog:
    """Writes the stacks of all threads when no step has ended for a time, and ends the process after as long again, with exit code 1.

    The process is ended by a timer in C, which needs no lock of Python's: it also ends one that hangs inside a native library.

    Args:
        output: gets ``stacks-rankN.txt``.
        timeout_seconds: longer than any step, evaluation or checkpoint takes.
    """

    def __init__(self, output: Path, timeout_seconds: float) -> None:
        self._path, self._timeout = output / f"stacks-rank{rank()}.txt", timeout_seconds
        self._last = time.monotonic()
        self._closing = threading.Event()
        self._file: IO[str] | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._file = self._path.open("a")
        self.beat()
        self._arm()
        self._thread.start()

    def beat(self) -> None:
        """A step has ended."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Stops watching. Nothing is left where nothing has hung."""
        if self._file is None:
            return
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self._file = None
        if self._path.stat().st_size == 0:
            self._path.unlink()

    def _arm(self) -> None:
        assert self._file is not None
        remaining = self._last + 2 * self._timeout - time.monotonic()
        faulthandler.dump_traceback_later(max(remaining, 1e-3), file=self._file, exit=True)

    def _watch(self) -> None:
        assert self._file is not None
        seen, has_reported = self._last, False
        while not self._closing.wait(self._timeout / _POLLS):
            if self._last != seen:
                seen, has_reported = self._last, False
                self._arm()
            elif not has_reported and time.monotonic() - seen >= self._timeout:
                has_reported = True
                faulthandler.dump_traceback(file=self._file)
                logger.error(
                    "no step has ended for %g s: the stacks of all threads are in %s; in %g s the process ends with exit code 1",
                    self._timeout,
                    self._path,
                    self._timeout,
                )
