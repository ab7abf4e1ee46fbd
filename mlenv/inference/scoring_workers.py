"""Who scores the parts: threads of this process, or actors on a Ray cluster that hold the models."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import torch

from mlenv.datasets.ray_workers import RayConfig
from mlenv.datasets.workers import in_order
from mlenv.errors import TrainingError
from mlenv.inference.part_scoring import Part, PartScorer, ScoredPart

if TYPE_CHECKING:
    from ray import ObjectRef

logger = logging.getLogger(__name__)

_AHEAD: Final = 2
"""Parts that are given to a worker before the first one that is missing: a slow part holds nobody up."""
MAX_RETRIES: Final = 3
"""Times that an actor is started again. More often, and the rows themselves are what kills it."""


def in_threads(scorer: PartScorer, parts: Iterable[Part], num_threads: int) -> Generator[ScoredPart, None, None]:
    """Parts in order. Every thread reads and computes its part by itself, on one core: nobody waits for anybody, and sums are
    rounded the same on any number of cores."""
    own, threads_before = threading.local(), torch.get_num_threads()

    def score(part: Part) -> ScoredPart:
        if not hasattr(own, "scorer"):
            torch.set_num_threads(1)
            own.scorer = scorer.replica()
        result: ScoredPart = own.scorer(part)
        return result

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="score")
    try:
        yield from in_order(parts, _AHEAD * num_threads, lambda part: pool.submit(score, part), Future.result, Future.cancel)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads_before)


def in_actors(scorer: PartScorer, parts: Iterable[Part], num_actors: int, address: str) -> Generator[ScoredPart, None, None]:
    """Parts in order. An actor that dies is started again, and what it was given is done again.

    Args:
        address: auto or host:port; empty starts a cluster of this machine.

    Raises:
        ConfigError: no cluster answers at the address.
        TrainingError: an actor died time and again.
    """
    cluster = RayConfig(num_workers=num_actors, address=address).build()
    ray, started = cluster.connect("--ray"), []
    try:
        stored = [ray.put(scorer)]  # in a list, or Ray would unpack it for the call
        num_gpus = int(any(one.device.type == "cuda" for one in scorer.scorers.values()))
        actor = ray.remote(num_cpus=1, num_gpus=num_gpus, max_restarts=MAX_RETRIES, max_task_retries=MAX_RETRIES)(_Actor)
        started = [actor.remote(stored) for _ in range(num_actors)]
        yield from in_order(parts, _AHEAD * num_actors, _Actors(started).submit, _wait, ray.cancel)
    finally:
        for one in started:
            ray.kill(one)
        cluster.close()


class _Actor:
    """Runs on the cluster."""

    def __init__(self, stored: list[ObjectRef[PartScorer]]) -> None:
        import ray

        torch.set_num_threads(1)
        self._scorer: PartScorer = ray.get(stored[0])

    def score(self, part: Part) -> tuple[ScoredPart, bool]:
        """With whether this actor has died before."""
        import ray

        return self._scorer(part), ray.get_runtime_context().was_current_actor_reconstructed


class _Actors:
    """Gives each part to the actor that has fewest to do."""

    def __init__(self, actors: list[Any]) -> None:
        self._busy: list[tuple[Any, list[Any]]] = [(actor, []) for actor in actors]

    def submit(self, part: Part) -> Any:
        import ray

        for _, pending in self._busy:
            pending[:] = ray.wait(pending, num_returns=len(pending), timeout=0)[1] if pending else []
        actor, pending = min(self._busy, key=lambda busy: len(busy[1]))
        pending.append(actor.score.remote(part))
        return pending[-1]


def _wait(pending: Any) -> ScoredPart:
    import ray

    try:
        scored, has_died = ray.get(pending)
    except ray.exceptions.RayTaskError as error:  # what the scorer raised
        raise error.cause from error
    except ray.exceptions.RayError as error:
        fix = "look at the cluster's memory, name fewer workers or smaller parts, and run the same command again: it goes on"
        first_line = str(error).strip().partition("\n")[0]
        raise TrainingError(f"--ray: parts were lost on the Ray cluster: {first_line} Fix: {fix}.") from error
    if has_died:
        logger.warning("--ray: %s was scored by an actor that had died and was started again", scored.part.name)
    result: ScoredPart = scored
    return result
