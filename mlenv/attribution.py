"""What each feature adds to one prediction, seen from the row that has none: integrated gradients, and their one-step estimate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from mlenv.batch import Batch
from mlenv.errors import ConfigError
from mlenv.missing_features import MissingFeatures
from mlenv.modules import Representation
from mlenv.row_sample import RowSample
from mlenv.schema import Schema

TOLERANCE: Final = 1e-3
"""How far the attributions of a row may add up beside the difference of its logits before it is given more steps."""
FIRST_STEPS: Final = 64
MOST_STEPS: Final = 4096


@dataclass(frozen=True)
class Attributions:
    """What the features add to the logits of some rows."""

    features: tuple[str, ...]
    values: Tensor
    """``(rows, tasks, features)`` float32, in logits."""
    logits: Tensor
    """``(rows, tasks)``, before calibration."""
    baseline: Tensor
    """``(rows, tasks)``, logits of the row in which every feature is missing."""

    @property
    def gaps(self) -> Tensor:
        """``(rows, tasks)``: by how much the attributions add up to something else than the difference of the logits."""
        return (self.values.sum(2) - (self.logits - self.baseline)).abs()


class Attributor:
    """Follows a model's logits along the straight line from the row without features to a row with them.

    The line runs through the output of the model's ``Representation``: the vectors of ids, the encoded sequences and the normalized
    numbers, all at once. So an id goes from what its table makes of null to its own vector, whatever the id, and a sequence is one
    feature. The gradient along the line times the way, summed over the columns of a feature, is what the feature adds.

    Source: Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017, arXiv:1703.01365, section 3.

    Raises:
        ConfigError: the model has no ``Representation``, or several.
    """

    def __init__(self, model: nn.Module, schema: Schema) -> None:
        found = [part for part in model.modules() if isinstance(part, Representation)]
        if len(found) != 1:
            fix = "build the model on mlenv.modules.Representation, or ask for the permutation importance alone"
            raise ConfigError("model", expected="one Representation, whose output is followed", received=f"{len(found)} of them", fix=fix)
        self._model, self._representation, self._schema = model, found[0], schema
        self._missing = MissingFeatures(schema)
        self.features = found[0].features

    def explain(self, batch: Batch) -> Attributions:
        """Integrated gradients. Rows that do not add up to ``TOLERANCE`` get twice as many steps, and again."""
        rows, steps = torch.arange(len(batch)), FIRST_STEPS
        result = self._integrate(batch, steps)
        while len(rows := rows[(result.gaps[rows] > TOLERANCE).any(1)]) and steps < MOST_STEPS:
            steps *= 2
            result.values[rows] = self._integrate(RowSample([batch], self._schema).take(rows), steps).values
        return result

    def estimate(self, batch: Batch) -> Attributions:
        """The gradient at the row itself times the whole way: one pass, and right where the logit is linear."""
        return self._along(batch, [1.0])

    def _integrate(self, batch: Batch, num_steps: int) -> Attributions:
        """By the midpoint rule: a kink of a ReLU costs it no more than it costs rules of a higher order."""
        return self._along(batch, [(step + 0.5) / num_steps for step in range(num_steps)])

    def _along(self, batch: Batch, places: Sequence[float]) -> Attributions:
        device = next(self._model.parameters()).device
        nothing = self._missing.of(batch, self._schema.features, torch.ones(len(batch), dtype=torch.bool))
        start, end = nothing.to(device), batch.to(device)
        with torch.no_grad():
            baseline, logits = self._model(start).float(), self._model(end).float()
            first, last = self._representation(start), self._representation(end)
        num_tasks = logits.shape[1]
        gradients = torch.zeros(num_tasks, *last.shape, dtype=torch.float64, device=last.device)
        for place in places:
            point = torch.lerp(first, last, place).requires_grad_()
            with self._put_in(point):
                outputs = self._model(end)
            for task in range(num_tasks):
                (gradient,) = torch.autograd.grad(outputs[:, task].sum(), point, retain_graph=task < num_tasks - 1)
                gradients[task] += gradient
        added = gradients / len(places) * (last - first)
        by_feature = [part.sum(2) for part in added.split(list(self._representation.field_dims), dim=2)]
        return Attributions(self.features, torch.stack(by_feature, 2).transpose(0, 1).float().cpu(), logits.cpu(), baseline.cpu())

    @contextmanager
    def _put_in(self, point: Tensor) -> Iterator[None]:
        """What lies behind the representation reads this instead."""
        handle = self._representation.register_forward_hook(lambda *_: point)
        try:
            yield
        finally:
            handle.remove()
