"""The grid that jagged events are padded to."""

from __future__ import annotations

import torch

from mlenv.modules.embeddings import EmbeddedSequence
from mlenv.modules.padding import Padding


def test_the_latest_events_share_the_last_column():
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]])
    padding = Padding(EmbeddedSequence(values, torch.tensor([3, 0, 1], dtype=torch.int32)))
    grid = padding.pad(values)
    assert grid[:, :, 0].tolist() == [[1, 2, 3], [0, 0, 0], [0, 0, 4]]
    assert torch.equal(padding.unpad(grid), values)
    assert padding.ages.tolist() == [2, 1, 0]
    assert padding.is_event.tolist() == [[True] * 3, [False] * 3, [False, False, True]]


def test_a_batch_without_events_has_a_grid():
    padding = Padding(EmbeddedSequence(torch.zeros(0, 2), torch.zeros(3, dtype=torch.int32)))
    assert not padding.is_event.any()
    assert padding.unpad(padding.pad(torch.zeros(0, 2))).shape == (0, 2)
