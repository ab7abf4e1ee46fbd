"""The processes of a training: how many there are, which one this is, and what they tell each other.

Without a process group there is one, of rank 0, and nothing waits or is sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mlenv.batch import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Shares:
    """How the rows of a training are divided over the ranks; each rank's batches are full but for its last one."""

    rows: tuple[int, ...]
    """Rows of each rank, over all epochs, from ``first_step`` on."""
    batch_size: int
    """Examples per step and rank."""
    first_step: int = 0
    """Steps before these rows were divided."""

    @property
    def num_steps(self) -> int:
        """Steps until every rank has trained on all of its rows."""
        return self.first_step - (-max(self.rows) // self.batch_size)

    def examples(self, step: int) -> int:
        """Examples of all ranks in the step of this number, from 0."""
        before = (step - self.first_step) * self.batch_size
        return sum(min(max(rows - before, 0), self.batch_size) for rows in self.rows)


def started_by_launcher() -> bool:
    """Whether torchrun, or whoever sets what it sets, started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    """Processes of the training."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0; known before the group is joined and after it is left."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else int(os.environ.get("RANK", 0))


def is_main() -> bool:
    """Whether this process writes the files of the run and speaks."""
    return rank() == 0


def own_group() -> ProcessGroup | None:
    """A group of all processes for what a second thread does: in the group of the training its messages would be mixed with those of the
    steps. All ranks ask for it at the same point; None where there is no process group."""
    return torch.distributed.new_group(backend="gloo") if torch.distributed.is_initialized() else None


def wait_for_all() -> None:
    """Returns once every process has come here."""
    if world_size() > 1:
        torch.distributed.barrier()


def from_main(text: str) -> str:
    """The text of rank 0."""
    return object_from_main(lambda: text)


def object_from_main(make: Callable[[], T]) -> T:
    """What rank 0 makes; the others only receive it, so it must pickle."""
    if world_size() == 1:
        return make()
    told = [make() if is_main() else None]
    torch.distributed.broadcast_object_list(told)
    return told[0]  # type: ignore[return-value]


def all_ranks(numbers: tuple[int, ...], group: ProcessGroup | None = None) -> list[tuple[int, ...]]:
    """These numbers of every rank, in the order of the ranks."""
    if world_size() == 1:
        return [numbers]
    own = torch.tensor(numbers, device=_device(group))
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    torch.distributed.all_gather(gathered, own, group)
    return [tuple(of_rank.tolist()) for of_rank in gathered]


def objects_of_all(own: T, group: ProcessGroup | None = None) -> list[T]:
    """What each rank has, in the order of the ranks; it must pickle."""
    told = [own] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(told, own, group)
    return told


def any_rank(fact: bool, group: ProcessGroup | None = None) -> bool:
    """Whether something is so on any rank; all ranks must ask at the same point."""
    return any(told for (told,) in all_ranks((int(fact),), group))


def summed(tensor: Tensor) -> Tensor:
    """The sum over all ranks; the tensor itself where there is one rank."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Averages over the ranks what no wrapper of the model averages."""
    if world_size() > 1:
        for parameter in parameters:
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            if gradient.is_sparse:
                parameter.grad = _summed_rows(gradient) / world_size()
            else:
                torch.distributed.all_reduce(gradient)
                parameter.grad = gradient / world_size()


def _summed_rows(gradient: Tensor) -> Tensor:
    """The sum over all ranks of gradients of a few rows of a table; nccl has none of its own."""
    own = gradient.coalesce()
    counts = all_ranks((own.values().shape[0],))
    longest = max(count for (count,) in counts)
    parts = []
    for tensor in (own.indices()[0], own.values()):
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(gathered, padded)
        parts.append(torch.cat([of_rank[:count] for of_rank, (count,) in zip(gathered, counts, strict=True)]))
    return torch.sparse_coo_tensor(parts[0].unsqueeze(0), parts[1], gradient.shape, check_invariants=False)


def clip_gradients(parameters: Iterable[Tensor], norm: float) -> None:
    """Scales gradients down together where their joint norm is above ``norm``; of divided parameters each rank has a part."""
    divided: list[Tensor] = []
    whole: list[Tensor] = []
    for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
        (divided if is_divided(gradient) else whole).append(local(gradient))
    total = nn.utils.get_total_norm(whole)
    if divided:
        total = (total.square() + summed(nn.utils.get_total_norm(divided).square())).sqrt()
    factor = (norm / (total + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
    torch._foreach_mul_([*divided, *whole], factor)


def is_divided(tensor: Tensor) -> bool:
    """Whether each rank has a part of a tensor, as FSDP leaves it."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be divided, in the same memory."""
    return tensor.to_local() if is_divided(tensor) else tensor  # type: ignore[attr-defined]


def share(tensors: Iterable[Tensor]) -> None:
    """Gives all ranks the values of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)


def own_rows(batch: Batch) -> Batch:
    """This rank's part of a batch that all ranks have; the parts are consecutive and the last ones may be shorter, or empty."""
    if world_size() == 1:
        return batch
    part = _part(len(batch))
    return batch.rows(min(rank() * part, len(batch)), min((rank() + 1) * part, len(batch)))


def rows_of_all(own: Tensor, num_rows: int) -> Tensor:
    """What ``own_rows`` divided, together again: ``(num_rows, ...)`` on every rank, of the ``(own rows, ...)`` of each."""
    if world_size() == 1:
        return own
    part = _part(num_rows)
    padded = own.new_zeros(part, *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    torch.distributed.all_gather(parts, padded)
    return torch.cat(parts)[:num_rows]


def _part(num_rows: int) -> int:
    return -(-num_rows // world_size())


def _device(group: ProcessGroup | None = None) -> torch.device:
    return torch.device("cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu")
