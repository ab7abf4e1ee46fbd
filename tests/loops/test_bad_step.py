"""Batches that are kept, and how many."""

from __future__ import annotations

import torch

from mlenv.batch import Batch, Position, SparseFeatures
from mlenv.loops.bad_step import KEPT_STEPS, bad_step_folder, load_batch, save_bad_step, save_batch
from mlenv.loops.step_statistics import StepStatistics


def make_batch(weighted: bool) -> Batch:
    ids = SparseFeatures(("a", "b"), torch.tensor([3, 1, 2]), torch.tensor([1, 0, 0, 2], dtype=torch.int32), (1, 2))
    if weighted:
        ids = SparseFeatures(ids.keys, ids.values, ids.lengths, ids.value_counts, torch.tensor([0.5, 1.0, 2.0]))
    rows = torch.tensor([[1.0], [torch.nan]])
    return Batch(ids, rows, rows, rows, Position(1, 2, 3), requests=torch.tensor([4, -1]) if weighted else None)


def test_a_batch_is_read_as_it_was_written(tmp_path):
    for weighted in (False, True):
        batch = make_batch(weighted)
        save_batch(batch, tmp_path / "batch.safetensors")
        read = load_batch(tmp_path / "batch.safetensors")
        assert (read.position, read.sparse.keys, read.sparse.value_counts) == (Position(1, 2, 3), ("a", "b"), (1, 2))
        for one, other in ((read, batch), (read.sparse, batch.sparse)):
            for name, value in vars(other).items():
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(getattr(one, name), value, rtol=0, atol=0, equal_nan=True)
                elif name in ("weights", "requests", "teacher"):
                    assert getattr(one, name) is None
    assert [path.name for path in tmp_path.iterdir()] == ["batch.safetensors"]


def test_the_newest_stay(tmp_path):
    (tmp_path / "bad_steps of mine").mkdir()
    for step in range(1, KEPT_STEPS + 3):
        folder = bad_step_folder(tmp_path, step)
        save_bad_step(folder, step, {"a": torch.ones(2)}, {"config.yaml": ""}, make_batch(False), StepStatistics({}, (), {}))
    kept = [f"bad_step-{step:08d}" for step in range(3, KEPT_STEPS + 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "bad_steps of mine"]
    assert sorted(path.name for path in (tmp_path / kept[-1]).iterdir()) == [
        "batch-rank0.safetensors",
        "statistics-rank0.json",
        f"step-{KEPT_STEPS + 2:08d}",
    ]
