"""What each feature adds to one prediction, seen from the row that has none: integrated gradients, and their one-step estimate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor, nn

from mlenv.batch import Batch
from mlenv.errors import ConfigError
from mlenv.insight.row_sample import RowSample
from mlenv.models.missing_features import MissingFeatures
from mlenv.modules import Representation
from mlenv.schema import Schema

TOLERANCE: Final = 1e-3
"""How far the attributions of a row may add up beside the difference of its logits before the line is divided further."""
FIRST_STEPS: Final = 32
MOST_STEPS: Final = 2048

_PASS_ROWS: Final = 2048


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
        """Integrated gradients. Each row's line is halved where its pieces miss the logit most, until the row adds up to ``TOLERANCE``.

        A line that starts at zeros turns sharply there in a model with layer normalization, and at every unit of a ReLU it has a kink:
        even steps would have to be as many as the smallest of these ask for.
        """
        line = _Line(self._model, self._representation, self._missing_all(batch), batch, self._schema)
        places = torch.arange(FIRST_STEPS + 1) / FIRST_STEPS
        rows = torch.arange(len(batch)).repeat_interleave(FIRST_STEPS + 1)
        logits = line.logits(rows, places.repeat(len(batch))).view(len(batch), FIRST_STEPS + 1, -1)
        first, last = logits[:, :-1].flatten(0, 1), logits[:, 1:].flatten(0, 1)
        starts, ends = places[:-1].repeat(len(batch)), places[1:].repeat(len(batch))
        pieces = line.pieces(torch.arange(len(batch)).repeat_interleave(FIRST_STEPS), starts, ends, first, last)
        while True:
            values = torch.zeros(len(batch), *pieces.added.shape[1:], dtype=torch.float64).index_add(0, pieces.rows, pieces.added)
            result = Attributions(self.features, values.float(), logits[:, -1], logits[:, 0])
            is_open = (result.gaps > TOLERANCE).any(1) & (torch.bincount(pieces.rows) < MOST_STEPS)
            if not is_open.any():
                return result
            worst = torch.zeros(len(batch), dtype=torch.float64).scatter_reduce(0, pieces.rows, pieces.misses, "amax")
            pieces = line.halved(pieces, is_open[pieces.rows] & (pieces.misses >= worst[pieces.rows] / 4))

    def estimate(self, batch: Batch) -> Attributions:
        """The gradient at the row itself times the whole way: one pass, and right where the logit is linear."""
        line = _Line(self._model, self._representation, self._missing_all(batch), batch, self._schema)
        rows = torch.arange(len(batch))
        logits, added = line.gradients(rows, torch.ones(len(batch)))
        return Attributions(self.features, added.float(), logits, line.logits(rows, torch.zeros(len(batch))))

    def _missing_all(self, batch: Batch) -> Batch:
        return self._missing.of(batch, self._schema.features, torch.ones(len(batch), dtype=torch.bool))


@dataclass(frozen=True)
class _Pieces:
    """Parts of the lines of several rows; on each, the gradient in the middle stands for all of it."""

    rows: Tensor
    starts: Tensor
    ends: Tensor
    """From 0 to 1 along the line of the row."""
    first: Tensor
    middle: Tensor
    last: Tensor
    """``(pieces, tasks)``: logits at the start, in the middle and at the end."""
    added: Tensor
    """``(pieces, tasks, features)`` float64: what the features do on it."""

    @property
    def misses(self) -> Tensor:
        """``(pieces,)`` float64: by how much that is beside the difference of the logits, in the task that it is worst for."""
        return (self.added.sum(2) - (self.last - self.first)).abs().amax(1)

    def where(self, kept: Tensor) -> _Pieces:
        return _Pieces(*(getattr(self, part.name)[kept] for part in fields(self)))

    def __add__(self, other: _Pieces) -> _Pieces:
        return _Pieces(*(torch.cat([getattr(self, part.name), getattr(other, part.name)]) for part in fields(self)))


class _Line:
    """From the representation of rows without features to that of the rows."""

    def __init__(self, model: nn.Module, representation: Representation, start: Batch, end: Batch, schema: Schema) -> None:
        self._model, self._representation = model, representation
        self._device = next(model.parameters()).device
        self._rows = RowSample([end], schema)
        with torch.no_grad():
            self._first, self._last = representation(start.to(self._device)), representation(end.to(self._device))

    def pieces(self, rows: Tensor, starts: Tensor, ends: Tensor, first: Tensor, last: Tensor) -> _Pieces:
        """Measures parts of the line whose ends are known."""
        middle, whole_way = self.gradients(rows, (starts + ends) / 2)
        return _Pieces(rows, starts, ends, first, middle, last, whole_way * (ends - starts).view(-1, 1, 1))

    def halved(self, pieces: _Pieces, chosen: Tensor) -> _Pieces:
        """The same line with two pieces in place of each chosen one."""
        old = pieces.where(chosen)
        middles = (old.starts + old.ends) / 2
        left = (old.rows, old.starts, middles, old.first, old.middle)
        right = (old.rows, middles, old.ends, old.middle, old.last)
        return pieces.where(~chosen) + self.pieces(*(torch.cat(pair) for pair in zip(left, right, strict=True)))

    def logits(self, rows: Tensor, places: Tensor) -> Tensor:
        """``(rows, tasks)``, each row at a place from 0 to 1."""
        with torch.no_grad():
            parts = [self._at(*some)[1] for some in self._chunks(rows, places)]
        return torch.cat(parts).cpu()

    def gradients(self, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and ``(rows, tasks, features)`` float64: the gradient there times the whole way."""
        all_logits, all_added = [], []
        for some, at in self._chunks(rows, places):
            point, logits = self._at(some, at)
            last_task = logits.shape[1] - 1
            gradients = [
                torch.autograd.grad(logits[:, task].sum(), point, retain_graph=task < last_task)[0] for task in range(last_task + 1)
            ]
            way = (self._last - self._first)[some.to(self._device)]
            added = torch.split(torch.stack(gradients, dim=1).double() * way.unsqueeze(1), list(self._representation.field_dims), dim=2)
            all_logits.append(logits.detach().cpu())
            all_added.append(torch.stack([part.sum(2) for part in added], dim=2).cpu())
        return torch.cat(all_logits), torch.cat(all_added)

    def _chunks(self, rows: Tensor, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(torch.split(rows, _PASS_ROWS), torch.split(places, _PASS_ROWS), strict=True)

    def _at(self, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Points of the line, and the logits there."""
        rows, places = rows.to(self._device), places.to(self._device)
        point = torch.lerp(self._first[rows], self._last[rows], places.unsqueeze(1)).requires_grad_()
        handle = self._representation.register_forward_hook(lambda *_: point)  # what lies behind it reads the point
        try:
            return point, self._model(self._rows.take(rows.cpu()).to(self._device)).float()
        finally:
            handle.remove()
