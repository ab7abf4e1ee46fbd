"""Workers that read and decode rows ahead of the training: threads of the trainer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from mlenv.errors import check_at_least

_Item = TypeVar("_Item")
_Pending = TypeVar("_Pending")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class ThreadsConfig:
    """Threads of the trainer's own process."""

    num_threads: int = 2
    """Threads; each reads one window ahead of the training."""

    def __post_init__(self) -> None:
        check_at_least("num_threads", self.num_threads, 1)

    @property
    def local_threads(self) -> int:
        return self.num_threads

    def build(self) -> ThreadWorkers:
        return ThreadWorkers(self)


class ThreadWorkers:
    """See ``mlenv.config.Workers``. Arrow and NumPy let go of the interpreter's lock, and nothing is copied."""

    def __init__(self, config: ThreadsConfig) -> None:
        self._num_threads = config.num_threads

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Generator[_Result, None, None]:
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode")
        try:
            yield from in_order(items, self._num_threads, lambda item: pool.submit(function, item), Future.result, Future.cancel)
        finally:
            pool.shutdown(wait=False)

    def close(self) -> None:
        """Threads end with the iteration that they work for."""


def in_order(
    items: Iterable[_Item],
    limit: int,
    submit: Callable[[_Item], _Pending],
    wait: Callable[[_Pending], _Result],
    cancel: Callable[[_Pending], object],
) -> Generator[_Result, None, None]:
    """Results in the order of the items. While one of them is used, ``limit`` others are under way or wait; no item after
    these has been looked at."""
    rest = iter(items)
    ahead = deque(submit(item) for item in islice(rest, limit))
    try:
        while ahead:
            result = wait(ahead.popleft())
            ahead.extend(submit(item) for item in islice(rest, 1))
            yield result
    finally:
        for pending in ahead:
            cancel(pending)
