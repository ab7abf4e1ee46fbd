"""From jagged events to a padded tensor and back, for what needs all events of an example side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from mlenv.modules.embeddings import EmbeddedSequence, rows_of_bags


class Padding:
    """Where each event of a batch lies in a ``(batch, longest)`` grid whose last column holds everyone's latest event.

    The grid is as wide as the longest sequence of the batch. On an accelerator, asking for that width waits for the device.
    """

    def __init__(self, sequence: EmbeddedSequence) -> None:
        lengths, num_events = sequence.lengths.long(), sequence.values.shape[0]
        # Two columns at least: an empty batch of events still has a grid, and a tracer takes a width of one for another program.
        self.batch_size, self.longest = lengths.shape[0], int(lengths.max().clamp(min=2))
        torch._check(self.longest >= 2)  # type: ignore[no-untyped-call]
        ends = lengths.cumsum(0)
        self.rows = rows_of_bags(lengths, num_events)
        """``(events,)``: the example of each event."""
        events = torch.arange(num_events, device=lengths.device)
        self._cells = (self.rows + 1) * self.longest - ends.index_select(0, self.rows) + events
        self.ages = torch.arange(self.longest - 1, -1, -1, device=lengths.device)
        """``(longest,)``: how many later events follow the one in this column; 0 for the latest."""
        self.is_event = self.ages < lengths.unsqueeze(1)
        """``(batch, longest)`` bool: False where there is only padding."""

    def pad(self, values: Tensor) -> Tensor:
        """``(events, dim)`` to ``(batch, longest, dim)``, zeros before the first event."""
        grid = values.new_zeros(self.batch_size * self.longest, values.shape[1]).index_copy(0, self._cells, values)
        return grid.view(self.batch_size, self.longest, -1)

    def unpad(self, grid: Tensor) -> Tensor:
        """``(batch, longest, dim)`` to ``(events, dim)``."""
        return grid.reshape(self.batch_size * self.longest, -1).index_select(0, self._cells)
