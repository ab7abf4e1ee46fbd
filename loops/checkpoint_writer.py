"""Checkpoints that are written while the training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch.distributed import ProcessGroup
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard

from mlenv.loops.ranks import any_rank, own_group

Outcome = Callable[[OSError | None], None]
"""Is told in the main thread what became of a checkpoint: why it was not written, or None."""


class CheckpointWriter:
    """Does what is slow about a checkpoint in a thread of its own, one after the other.

    All ranks use theirs at the same points; in the thread they talk in a group of their own. A process that is killed meanwhile leaves
    what it would have left if it had waited: the older checkpoints, and none that is there in part.
    """

    def __init__(self) -> None:
        self._group = own_group()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: list[tuple[Future[None], Outcome]] = []
        self._copies: dict[str, Any] = {}

    def copied(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors as they are now, in memory of the host that is used again each time; each rank has its shards."""
        assert not self._in_flight, "the copies are still being written"
        self._copies = {name: _copied(tensor, self._copies.get(name), self._group) for name, tensor in tensors.items()}
        return self._copies

    def begin(self, write: Callable[[ProcessGroup | None], None], outcome: Outcome) -> None:
        """Has a checkpoint written once those before it are."""
        self._in_flight.append((self._thread.submit(write, self._group), outcome))

    @property
    def is_idle(self) -> bool:
        """Whether this rank has written all that was begun."""
        return all(written.done() for written, _ in self._in_flight)

    def look(self) -> None:
        """Tells outcomes if every rank has written; else the ranks would go different ways after a failure."""
        if self._in_flight and not any_rank(not self.is_idle):
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more and every outcome is told.

        Raises:
            Exception: that of an outcome, or one in the thread that is no OSError.
        """
        while self._in_flight:
            written, outcome = self._in_flight.pop(0)
            failure = None
            try:
                written.result()
            except OSError as error:
                failure = error
            outcome(failure)

    def close(self) -> None:
        """Waits for the thread; outcomes that were not asked for are nobody's any more."""
        self._thread.shutdown()


def _copied(tensor: Any, before: Any, group: ProcessGroup | None) -> Any:
    """A copy, in the memory of the one before where that has the same shape: new memory costs five times as much as the copying."""
    if not isinstance(tensor, ShardedTensor):
        if before is not None and (before.shape, before.dtype) == (tensor.shape, tensor.dtype):
            return before.copy_(tensor.detach())
        return tensor.detach().to("cpu", copy=True)
    if before is not None:
        for shard, copy in zip(tensor.local_shards(), before.local_shards(), strict=True):
            copy.tensor.copy_(shard.tensor.detach())
        return before
    on_host = tensor.cpu(process_group=group)
    if on_host is not tensor:
        return on_host
    shards = [Shard(shard.tensor.detach().clone(), shard.metadata) for shard in tensor.local_shards()]
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, sharded_tensor_metadata=tensor.metadata(), process_group=group)
