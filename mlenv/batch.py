"""One step's examples as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor

from mlenv.errors import require

if TYPE_CHECKING:
    import pyarrow as pa
    from torchrec import KeyedJaggedTensor

    from mlenv.schema import Schema


@dataclass(frozen=True)
class Position:
    """Where a source continues: the next row of the next window of rows, in the source's own seeded order."""

    epoch: int = 0
    window: int = 0
    row: int = 0


START = Position()

_ALIGNMENT: Final = 64
"""Bytes; a cache line, and more than any type needs."""

Extra = Literal["metadata", "requests", "teacher"]
"""Parts of a batch that a source reads only when asked; each is the field of ``Batch`` of that name."""


@dataclass(frozen=True)
class SparseFeatures:
    """Ids of several keys in the memory order of TorchRec's KeyedJaggedTensor: all bags of key 0, then of key 1, ...

    Invariants: ``len(lengths) == len(keys) * batch_size``; ``sum(value_counts) == len(values)``; within a key, bag i
    belongs to example i.
    """

    keys: tuple[str, ...]
    values: Tensor
    """``(ids,)`` int64, each a row of its key's table."""
    lengths: Tensor
    """``(keys * batch,)`` int32, ids per bag."""
    value_counts: tuple[int, ...]
    """Ids per key, known on the host so that slicing never waits for the device."""
    weights: Tensor | None = None
    """``(ids,)`` float32, or None when every weight is 1."""

    @property
    def batch_size(self) -> int:
        """Bags per key."""
        return self.lengths.numel() // len(self.keys) if self.keys else 0

    def select(self, start: int, stop: int) -> SparseFeatures:
        """Keys ``start`` to ``stop`` as views, without a copy."""
        ends = [0, *accumulate(self.value_counts)]
        ids, bags = slice(ends[start], ends[stop]), slice(start * self.batch_size, stop * self.batch_size)
        weights = None if self.weights is None else self.weights[ids]
        return SparseFeatures(self.keys[start:stop], self.values[ids], self.lengths[bags], self.value_counts[start:stop], weights)

    def rows(self, start: int, stop: int) -> SparseFeatures:
        """Bags ``start`` to ``stop`` of every key; reads lengths on the host."""
        lengths = self.lengths.view(len(self.keys), self.batch_size) if self.keys else self.lengths.view(0, 0)
        firsts = torch.tensor([0, *accumulate(self.value_counts)])[:-1] + lengths[:, :start].sum(1).cpu()
        kept = lengths[:, start:stop]
        counts = tuple(kept.sum(1).tolist())
        ids = [slice(first, first + count) for first, count in zip(firsts.tolist(), counts, strict=True)]

        def cut(tensor: Tensor) -> Tensor:
            return torch.cat([tensor[where] for where in ids]) if ids else tensor

        weights = None if self.weights is None else cut(self.weights)
        return SparseFeatures(self.keys, cut(self.values), kept.reshape(-1), counts, weights)

    def to_keyed_jagged_tensor(self) -> KeyedJaggedTensor:
        """The same memory as TorchRec takes it; nothing is copied.

        Raises:
            MlenvError: torchrec cannot be imported.
        """
        torchrec = require("torchrec", extra="torchrec")
        return torchrec.KeyedJaggedTensor(
            keys=list(self.keys),
            values=self.values,
            weights=self.weights,
            lengths=self.lengths,
            stride=self.batch_size,
            length_per_key=list(self.value_counts),
        )


@dataclass(frozen=True)
class Batch:
    """One step's examples. Row i of every field is the same example, in source order; no padding rows."""

    sparse: SparseFeatures
    """Ids per sparse key of the schema; an empty bag pools to zeros."""
    dense: Tensor
    """``(batch, dense_columns)`` float32, raw values, normalized inside the model. Nulls are filled by the schema already;
    NaN is the null of a numeric feature without a default. Never infinite."""
    labels: Tensor
    """``(batch, tasks)`` float32, 0 or 1; 0 where the weight hides it."""
    weights: Tensor
    """``(batch, tasks)`` float32, >= 0; 0 hides an example from a task."""
    position: Position = START
    """Where the source continues after this batch."""
    metadata: pa.RecordBatch | None = None
    """Pass-through columns (row key, request, segments) when the source was asked for them; always on the host."""
    requests: Tensor | None = None
    """``(batch,)`` int64, equal for rows of one request of this batch; negative and of its own for a row without one."""
    teacher: Tensor | None = None
    """``(batch, tasks)`` float32, a teacher's predictions in [0, 1]; NaN where it has none."""

    def __len__(self) -> int:
        return self.labels.shape[0]

    def rows(self, start: int, stop: int) -> Batch:
        """Examples ``start`` to ``stop``; the position stays that after the whole batch."""
        present = {name: part for name in ("requests", "teacher") if (part := getattr(self, name)) is not None}
        cut = {
            name: part[start:stop] for name, part in {**present, **{n: getattr(self, n) for n in ("dense", "labels", "weights")}}.items()
        }
        metadata = None if self.metadata is None else self.metadata.slice(start, stop - start)
        return replace(self, sparse=self.sparse.rows(start, stop), metadata=metadata, **cut)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same examples on another device, sent in one piece; metadata stays on the host. Itself where it is there already."""
        device, tensors = torch.device(device), self._tensors()
        if self.labels.device.type == device.type:
            return self  # a process has one device of a kind
        buffer = packed(list(tensors.values()), pin=device.type == "cuda").to(device, non_blocking=non_blocking)
        moved: dict[str, Any] = dict(zip(tensors, unpacked(buffer, list(tensors.values())), strict=True))
        sparse = replace(self.sparse, **{name.removeprefix("sparse."): moved.pop(name) for name in list(moved) if "." in name})
        return replace(self, sparse=sparse, **moved)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keeps the memory of the batch until a stream of the GPU, other than the one that it was sent in, is done with it."""
        for tensor in self._tensors().values():
            tensor.record_stream(stream)

    def _tensors(self) -> dict[str, Tensor]:
        sparse = {f"sparse.{name}": getattr(self.sparse, name) for name in ("values", "lengths", "weights")}
        own = {name: getattr(self, name) for name in ("dense", "labels", "weights", "requests", "teacher")}
        return {name: tensor for name, tensor in {**sparse, **own}.items() if tensor is not None}


def packed(tensors: Sequence[Tensor], pin: bool = False) -> Tensor:
    """The bytes of tensors of the host, each where any type may begin; in memory that a GPU reads by itself if ``pin``."""
    ends = _ends(tensors)
    buffer = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8, pin_memory=pin)
    for tensor, view in zip(tensors, unpacked(buffer, tensors), strict=True):
        view.copy_(tensor)
    return buffer


def unpacked(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of a buffer that is packed like these tensors: the same types and shapes, one behind another."""
    starts = [0, *_ends(tensors)][:-1]
    return [
        buffer[start : start + tensor.numel() * tensor.itemsize].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=True)
    ]


def _ends(tensors: Sequence[Tensor]) -> list[int]:
    sizes = (tensor.numel() * tensor.itemsize for tensor in tensors)
    return list(accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes))


def example_batch(schema: Schema, num_rows: int = 2) -> Batch:
    """Rows in which every feature is missing: enough to see what shapes a model gives."""
    keys = tuple(key.name for key in schema.sparse_keys)
    weights = torch.zeros(0) if any(key.group == "weighted_bag" for key in schema.sparse_keys) else None
    no_ids, no_lengths = torch.zeros(0, dtype=torch.int64), torch.zeros(len(keys) * num_rows, dtype=torch.int32)
    sparse = SparseFeatures(keys, no_ids, no_lengths, (0,) * len(keys), weights)
    targets = torch.zeros(num_rows, len(schema.tasks))
    requests, teacher = torch.zeros(num_rows, dtype=torch.int64), torch.full_like(targets, torch.nan)
    return Batch(sparse, torch.zeros(num_rows, schema.num_dense), targets, targets, requests=requests, teacher=teacher)
