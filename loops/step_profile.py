"""Where a few steps spend their time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.profiler import ProfilerActivity, profile

from mlenv.batch import Batch
from mlenv.loops.ranks import is_main
from mlenv.loops.train_step import StepOutput, TrainStep

if TYPE_CHECKING:
    from mlenv.loops.fit import Progress

PROFILE_FOLDER: Final = "profile"
TRACE_FILE: Final = "trace.json"
WARM_UP_STEPS: Final = 10
"""Steps of a process that are not looked at: kernels are chosen and memory is found in them."""

_COMMUNICATION: Final = ("nccl", "gloo:", "c10d::", "record_param_comms")
"""How the names of what processes send each other begin."""


@dataclass(frozen=True)
class Operator:
    """One kind of operator, or of kernel."""

    name: str
    calls: int
    host_seconds: float
    """Of its own, without the operators that it calls."""
    device_seconds: float


@dataclass(frozen=True)
class StepProfile:
    """What a few steps took, on rank 0."""

    device: str
    num_steps: int
    seconds: float
    """By the clock, while the profiler looked on."""
    waiting_seconds: float
    """Without a batch."""
    communication_seconds: float
    """Sending and receiving between processes: kernels of a GPU, which may run beside others, or of a CPU the time in such operators."""
    operators: tuple[Operator, ...]
    """All others, those that took longest on the device, or without one on the host, first."""

    @property
    def host_seconds(self) -> float:
        """Of operators on the host; on a GPU they start kernels."""
        return sum(operator.host_seconds for operator in self.operators)

    @property
    def device_seconds(self) -> float:
        """Of kernels on a GPU, without communication; 0 on a CPU."""
        return sum(operator.device_seconds for operator in self.operators)


class ProfiledStep:
    """Looks at a few steps of another one after a warm-up, writes their trace, and tells what they took.

    Args:
        num_steps: that are looked at, on rank 0 alone.
        folder: for the trace.
        done: is given the profile, once.
    """

    def __init__(self, step: TrainStep, num_steps: int, device: torch.device, folder: Path, done: Callable[[StepProfile], None]) -> None:
        self._step, self._num_steps, self._device, self._folder, self._done = step, num_steps, device, folder, done
        self._num_seen, self._waited, self._started = 0, 0.0, 0.0
        self._profiler: profile | None = None
        self._source: Iterator[Batch] | None = None
        self._batches: Iterator[Batch] = iter(())

    def advance(self, batches: Iterator[Batch], progress: Progress) -> StepOutput | None:
        """Lets the step train on the next batch."""
        if batches is not self._source:
            self._source, self._batches = batches, self._timed(batches)
        if self._num_seen == WARM_UP_STEPS and is_main():
            self._begin()
        output = self._step.advance(self._batches, progress)
        self._num_seen += 1
        if self._profiler is not None and (output is None or self._num_seen == WARM_UP_STEPS + self._num_steps):
            self._end(self._num_seen - WARM_UP_STEPS - (output is None))
        return output

    def close(self) -> None:
        """Ends looking on when the training ends meanwhile."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def _begin(self) -> None:
        is_gpu = self._device.type == "cuda"
        self._profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])])
        self._profiler.start()
        self._waited, self._started = 0.0, time.perf_counter()

    def _end(self, num_steps: int) -> None:
        assert self._profiler is not None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds, waited, profiler = time.perf_counter() - self._started, self._waited, self._profiler
        self.close()
        self._folder.mkdir(exist_ok=True)
        temporary = self._folder / f".{TRACE_FILE}.part"
        profiler.export_chrome_trace(str(temporary))
        temporary.replace(self._folder / TRACE_FILE)
        self._done(profile_of(profiler.key_averages(), self._device, num_steps, seconds, waited))


def profile_of(events: Any, device: torch.device, num_steps: int, seconds: float, waited: float) -> StepProfile:
    """Sums up what the profiler saw."""
    is_gpu = device.type == "cuda"
    operators, communication = [], 0.0
    for event in (event for event in events if not event.is_user_annotation):  # spans of Python, with operators in them
        on_host, on_device = event.self_cpu_time_total / 1e6, getattr(event, "self_device_time_total", 0.0) / 1e6
        if event.key.lower().startswith(_COMMUNICATION):
            communication += on_device if is_gpu else on_host
        else:
            operators.append(Operator(event.key, event.count, on_host, on_device))
    operators.sort(key=lambda operator: operator.device_seconds if is_gpu else operator.host_seconds, reverse=True)
    return StepProfile(str(device), num_steps, seconds, waited, communication, tuple(operators))
