"""What a model gives."""

from __future__ import annotations

from torch import Tensor

from mlenv.batch import Batch
from mlenv.errors import ConfigError


def check_logits(logits: Tensor, batch: Batch) -> None:
    """Raises ConfigError unless a model gives one logit per example and task."""
    if logits.shape != batch.labels.shape:
        expected = f"logits of shape (batch, tasks) = {tuple(batch.labels.shape)}"
        raise ConfigError("model", expected=expected, received=tuple(logits.shape), fix="return one column per task of schema.labels")
