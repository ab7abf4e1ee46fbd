"""Ways to train that take turns, each in a process of its own, so that none changes the threads or the memory of another."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

ROOT = Path(__file__).parent.parent


class Contender:
    """A process that trains a number of steps whenever it is told to, and says how fast it was.

    Args:
        command: arguments of Python: a module that calls ``serve``.
        environment: variables beside those of this process.
        cores: those that it may run on; None for all.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, cores: set[int] | None = None) -> None:
        limited = (lambda: os.sched_setaffinity(0, cores)) if cores is not None else None
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                preexec_fn=limited,
            )

    def rate(self, steps: int) -> float:
        """Rows/s of this many steps.

        Raises:
            RuntimeError: the process ended; its messages are in the log.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self._process.stdout:
            if line.startswith("{"):
                told = json.loads(line)
                return float(told["rows"] / told["seconds"])
        raise RuntimeError(f"{' '.join(self._process.args[1:])}: {self._log.read_text()[-2000:]}")  # type: ignore[index, arg-type]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()


def serve(train: Callable[[int], int]) -> None:
    """Trains as many steps as each line of the input says; ``train`` returns the rows that it took."""
    for line in sys.stdin:
        started = time.perf_counter()
        rows = train(int(line))
        print(json.dumps({"rows": rows, "seconds": time.perf_counter() - started}), flush=True)


class Turn(Protocol):
    """Who takes turns."""

    def rate(self, steps: int) -> float:
        """Rows/s of this many steps."""


def rates_in_turn(contenders: Mapping[str, Turn], repetitions: int, seconds: float, batch_size: int) -> dict[str, list[float]]:
    """Rows/s of each way, repetition by repetition, in turn. Each turn has as many steps as the way trains in about ``seconds``."""
    steps = {}
    for name, contender in contenders.items():
        contender.rate(4)  # compiles, allocates, fills caches
        steps[name] = max(round(contender.rate(8) * seconds / batch_size), 8)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, contender in contenders.items():
            rates[name].append(contender.rate(steps[name]))
    return rates


def median_ratio(rates: Mapping[str, Sequence[float]], way: str, reference: str) -> float:
    """Speed of a way relative to the reference: the median over repetitions of the paired ratios."""
    return statistics.median(own / other for own, other in zip(rates[way], rates[reference], strict=True))
