"""Workers on the CPUs of a Ray cluster, which read and decode rows while the trainer trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mlenv.datasets.ray_cluster import check_address, connect
from mlenv.datasets.workers import in_order
from mlenv.errors import TrainingError, check_at_least, require

if TYPE_CHECKING:
    from ray import ObjectRef

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

MAX_RETRIES: Final = 3
"""Times that a task runs again after its process or its node died. More often, and the task itself is what kills them."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Tasks on a Ray cluster, which the trainer starts on its own machine or joins."""

    num_workers: int = 2
    """Tasks under way at once; each reads one window ahead of the training."""
    cpus_per_task: int = 1
    """CPUs that Ray sets aside for a task."""
    address: str = ""
    """Cluster to join: auto for the one of this machine, or host:port. Empty starts one for the time of the training."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "cpus_per_task"):
            check_at_least(name, getattr(self, name), 1)
        check_address(self.address)

    @property
    def local_threads(self) -> int:
        return 0

    def build(self) -> RayWorkers:
        return RayWorkers(self)


class RayWorkers:
    """See ``mlenv.config.Workers``. Every item is a Ray task, so that a process or node that dies costs its items once more.

    Numbers and Arrow buffers stay in the shared memory that the tasks wrote them to: results are views of it, read-only.
    A process that is connected to a cluster stays with that one.
    """

    def __init__(self, config: RayConfig) -> None:
        self._config = config
        self._has_connected = False

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Generator[_Result, None, None]:
        """
        Raises:
            MlenvError: ray is not installed.
            ConfigError: no cluster answers at the address.
            TrainingError: a task's process died time and again, or what it made was lost.
        """
        ray = self.connect()
        task = ray.remote(num_cpus=self._config.cpus_per_task, max_retries=0)(_apply)  # begun again below, where it is said
        stored = [ray.put(function)]  # in a list, or Ray would unpack it anew for every task
        begin = partial(task.remote, stored)
        yield from in_order(items, self._config.num_workers, lambda item: _Task(partial(begin, item)), _wait, _cancel)

    def close(self) -> None:
        """Leaves a cluster that was joined, ends one that was started."""
        if self._has_connected:
            require("ray", extra="ray").shutdown()
            self._has_connected = False

    def connect(self, key: str = "data.workers.address") -> ModuleType:
        """Ray, connected; ``close`` ends that.

        Args:
            key: where the config has the address.
        """
        ray = require("ray", extra="ray")
        if ray.is_initialized():
            return ray
        num_cpus = self._config.num_workers * self._config.cpus_per_task
        connect(self._config.address, key, num_cpus=num_cpus)
        self._has_connected = True
        return ray


def _apply(stored: list[ObjectRef[Callable[[_Item], _Result]]], item: _Item) -> _Result:
    """Runs on the cluster."""
    return _function(stored[0])(item)  # type: ignore[no-any-return]


@lru_cache(maxsize=4)
def _function(stored: ObjectRef[Any]) -> Any:
    """Unpacked once per process: it may hold the footers of thousands of files."""
    import ray

    return ray.get(stored)


class _Task:
    """An item under way on the cluster."""

    def __init__(self, begin: Callable[[], ObjectRef[Any]]) -> None:
        self.begin, self.pending = begin, begin()


def _wait(task: _Task) -> Any:
    import ray

    deaths = 0
    while True:
        try:
            return ray.get(task.pending)
        except ray.exceptions.RayTaskError as error:  # what the function raised
            raise error.cause from error
        except ray.exceptions.RayError as error:
            deaths += 1
            if deaths > MAX_RETRIES:
                fix = "lower data.shuffle_rows if memory ran out, and run the same command again: it goes on from the last checkpoint"
                raise TrainingError(f"data.workers: rows were lost on the Ray cluster: {_first_line(error)} Fix: {fix}.") from error
            logger.warning("data.workers: %s; its rows are read again", type(error).__name__)
            task.pending = task.begin()


def _cancel(task: _Task) -> None:
    import ray

    if ray.is_initialized():  # otherwise cancelling would start a cluster
        ray.cancel(task.pending)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
