"""What a scheduler says before it takes the machine away."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Final, Self

from mlenv.errors import StoppedError

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM comes from Kubernetes, from Slurm and from ``kill``; SIGUSR1 from Slurm, when told to, before a job's time is over."""

_PR_SET_PDEATHSIG: Final = 1

_forwarded = ""


def forward(name: str) -> None:
    """Notes a signal for this process that came to another one, which speaks for it: to the launcher of a worker on a cluster."""
    global _forwarded
    _forwarded = name


def end_with_parent() -> None:
    """Has the kernel send SIGTERM here when the process that started this one ends, however it ends.

    Processes whose launcher was killed would go on by themselves, and keep the same command from being run again.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class StopSignals:
    """Ends a process that is asked to end, as Ctrl-C would: StoppedError is raised wherever the program is.

    While they are held, the signals are only noted, so that a training can finish its step and write it down. Leaving the context puts
    back what acted on the signals before. Python hears of signals in the main thread only: entered in another, this does nothing.
    """

    def __init__(self) -> None:
        self._received = ""
        self._is_held = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def received(self) -> str:
        """Name of the last signal that came; empty for none."""
        return self._received or _forwarded

    @received.setter
    def received(self, name: str) -> None:
        self._received = name

    def hold(self) -> None:
        """Notes signals from now on, and lets the program go on."""
        self._is_held = True

    def release(self) -> None:
        """Lets signals end the program again; what was noted meanwhile is the caller's to see to."""
        self._is_held = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        if not self._is_held:
            raise StoppedError(self._received)
