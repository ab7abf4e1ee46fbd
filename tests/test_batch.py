"""A batch goes to a device in one piece and is the same there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlenv.batch import Batch, Position, SparseFeatures, packed, unpacked

LENGTHS = torch.tensor([1, 0, 2, 0, 1, 3], dtype=torch.int32)
WHOLE = Batch(
    SparseFeatures(("item", "tags"), torch.arange(7), LENGTHS, (3, 4), torch.arange(7) / 10),
    dense=torch.tensor([[1.0, torch.nan, -0.0]] * 3).T.contiguous().T,
    labels=torch.tensor([[1.0], [0.0], [1.0]]),
    weights=torch.rand(3, 2)[:, :1],
    position=Position(row=3),
    requests=torch.tensor([4, 4, -1]),
    teacher=torch.tensor([[0.5], [torch.nan], [0.1]]),
)
BATCHES = {
    "whole": WHOLE,
    "without what may be missing": replace(WHOLE, sparse=replace(WHOLE.sparse, weights=None), requests=None, teacher=None),
    "no rows": WHOLE.rows(1, 1),
    "no ids": replace(WHOLE, sparse=SparseFeatures((), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), ())),
    "no numbers": replace(WHOLE, dense=torch.zeros(3, 0)),
}


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    """All that are there, in a fixed order."""
    sparse = batch.sparse
    every = (sparse.values, sparse.lengths, sparse.weights, batch.dense, batch.labels, batch.weights, batch.requests, batch.teacher)
    return [tensor for tensor in every if tensor is not None]


class Copies(TorchDispatchMode):
    """Notes the tensors that are sent from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if function is torch.ops.aten._to_copy.default and arguments[0].device != result.device:
            self.sent.append(arguments[0])
        return result


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_what_is_packed_comes_out_as_it_was(batch):
    tensors = tensors_of(batch)
    buffer = packed(tensors)
    for tensor, view in zip(tensors, unpacked(buffer, tensors), strict=True):
        assert (view.dtype, view.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(view.nan_to_num(nan=7.0), tensor.nan_to_num(nan=7.0))
        assert torch.equal(view.isnan(), tensor.isnan())
        assert view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert packed([]).numel() == 0


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_one_copy_brings_a_batch_to_a_device(batch):
    with Copies() as copies:
        moved = batch.to("meta", non_blocking=True)
    assert [tensor.dtype for tensor in copies.sent] == [torch.uint8]
    assert copies.sent[0].numel() < sum(tensor.numel() * tensor.itemsize + 64 for tensor in tensors_of(batch)) + 1
    assert (moved.sparse.keys, moved.sparse.value_counts) == (batch.sparse.keys, batch.sparse.value_counts)
    assert (moved.position, len(moved)) == (batch.position, len(batch))
    for tensor, there in zip(tensors_of(batch), tensors_of(moved), strict=True):
        assert (there.device.type, there.dtype, there.shape) == ("meta", tensor.dtype, tensor.shape)
    assert [name for name in ("requests", "teacher") if getattr(moved, name) is None] == [
        name for name in ("requests", "teacher") if getattr(batch, name) is None
    ]


def test_nothing_is_copied_where_the_batch_is_already():
    with Copies() as copies:
        assert WHOLE.to("cpu") is WHOLE
    assert copies.sent == []
