"""The numeric part of a served model, from ids and numbers to calibrated predictions, in one module that can be exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mlenv.batch import Batch, SparseFeatures
from mlenv.loops.calibration import Calibrator
from mlenv.schema import Schema


class ServedGraph(nn.Module):
    """Runs a model and the calibrators of its tasks.

    Args:
        model: a Batch in, logits out; in evaluation mode.
        calibrators: by task; a task without one gets the sigmoid of its logits.
    """

    def __init__(self, model: nn.Module, schema: Schema, calibrators: Mapping[str, Calibrator]) -> None:
        super().__init__()
        self.model = model
        self._tasks = schema.tasks
        self._keys = tuple(key.name for key in schema.sparse_keys)
        self._is_weighted = [key.group == "weighted_bag" for key in schema.sparse_keys]
        self.calibrators = nn.ModuleList(calibrators[task].module if task in calibrators else Sigmoid() for task in schema.tasks)
        self._codes: list[slice | None] = []
        """Columns of the segment codes of each task."""
        num_codes = 0
        for task in schema.tasks:
            width = len(calibrators[task].segments) if task in calibrators else 0
            self._codes.append(slice(num_codes, num_codes + width) if width else None)
            num_codes += width

    def forward(self, ids: list[Tensor], lengths: Tensor, weights: list[Tensor], dense: Tensor, codes: Tensor) -> Tensor:
        """
        Args:
            ids: ``(ids,)`` int64 for each sparse key of the schema; of a single-valued key exactly one per example.
            lengths: ``(keys, batch)`` int32, ids per bag; 0 hides the id of a single-valued key.
            weights: ``(ids,)`` float32 for each key of a weighted feature.
            dense: ``(batch, num_dense)`` float32, raw values.
            codes: ``(batch, segment columns)`` int64, codes of the segment values that the calibrators read.

        Returns:
            predictions ``(batch, tasks)`` float32 in (0, 1).
        """
        counts: Any = tuple(of_key.shape[0] for of_key in ids)
        values = torch.cat(ids) if ids else dense.new_zeros(0, dtype=torch.int64)
        sparse = SparseFeatures(self._keys, values, lengths.flatten(), counts, self._weights(ids, weights))
        hidden = dense.new_zeros(dense.shape[0], len(self._tasks))
        logits = self.model(Batch(sparse, dense, hidden, hidden))
        predictions = []
        for column, calibrator, where in zip(logits.unbind(1), self.calibrators, self._codes, strict=True):
            predictions.append(calibrator(column) if where is None else calibrator(column, codes[:, where]))
        return torch.stack(predictions, dim=1)

    def _weights(self, ids: list[Tensor], weights: list[Tensor]) -> Tensor | None:
        if not any(self._is_weighted):
            return None
        given = iter(weights)
        pairs = zip(ids, self._is_weighted, strict=True)
        return torch.cat([next(given) if is_weighted else torch.ones_like(of_key, dtype=torch.float32) for of_key, is_weighted in pairs])


class Sigmoid(nn.Module):
    """What stands where a task has no calibrator."""

    def forward(self, logits: Tensor) -> Tensor:
        """``(batch,)`` to predictions ``(batch,)`` float32."""
        return torch.sigmoid(logits.float())
