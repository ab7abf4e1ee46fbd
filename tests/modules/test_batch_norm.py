"""Batch normalization of batches that have no spread."""

from __future__ import annotations

import torch
from torch import nn

from mlenv.modules.batch_norm import BatchNorm


def test_it_is_torchs_own_but_for_one_row_and_none():
    generator = torch.Generator().manual_seed(0)
    layer, expected, rows = BatchNorm(3), nn.BatchNorm1d(3), torch.randn(8, 3, generator=generator)
    torch.testing.assert_close(layer(rows), expected(rows), rtol=0, atol=0)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for few in (rows[:1], rows[:0]):
        torch.testing.assert_close(layer(few), expected.eval()(few))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    layer(rows)
    assert layer.num_batches_tracked == 2
