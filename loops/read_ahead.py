"""A step that reads ahead: while one batch is trained, the next is on its way to the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mlenv.batch import Batch
from mlenv.loops.ranks import world_size
from mlenv.loops.train_step import StepOutput, TrainStep
from mlenv.modules.embeddings import TorchRecEmbeddings
from mlenv.modules.objective import Objective

if TYPE_CHECKING:
    from mlenv.loops.fit import Progress


class ReadAheadStep:
    """Hands another step batches that are on the device already; its output tells the position of what was trained, as ever.

    The next batch is read when the work of a step has been given to the device, and is copied in a stream of its own. Before a
    step begins, the ids of the next batch start on their way to the ranks that hold the rows; between forward and backward, when
    all ranks know how many ids come, the ids follow: a GPU computes meanwhile.

    Args:
        filler: rows that weigh nothing. A rank that has no more rows reads these ahead, so that all send and receive in the same order.
        num_steps: of the whole training; nothing is read ahead of its end.
        num_batches: that a step takes.
    """

    def __init__(
        self,
        step: TrainStep,
        model: nn.Module,
        objective: Objective,
        device: torch.device,
        filler: Batch,
        num_steps: int,
        num_batches: int = 1,
    ) -> None:
        self._step, self._device, self._filler = step, device, filler
        self._num_steps, self._num_batches = num_steps, num_batches
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._tables = [module for module in model.modules() if isinstance(module, TorchRecEmbeddings)]
        self._ready: deque[Batch] = deque()
        self._source: Iterator[Batch] | None = None
        self._num_read = 0
        objective.register_forward_hook(self._between_forward_and_backward)

    def advance(self, batches: Iterator[Batch], progress: Progress) -> StepOutput | None:
        """Trains on the next batch, or the next few; None when no rank has one."""
        if batches is not self._source:  # another training, or the first; what was read for the one before is read again
            self._source, self._filler = batches, replace(self._filler, position=progress.position)
            self._num_read = progress.step * self._num_batches
            self._ready.clear()
            for tables in self._tables:
                tables.ids_ahead.forget()
            self._read(batches)
        output = self._step.advance(self._handed_out(batches), progress)
        self._read(batches)
        return output

    def _handed_out(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while self._ready:
            batch = self._ready.popleft()
            if self._stream is not None:
                now = torch.cuda.current_stream(self._device)
                now.wait_stream(self._stream)
                batch.record_stream(now)
            if not self._ready:
                self._read(batches)
            if self._ready:
                with self._aside():
                    for tables in self._tables:
                        tables.send_ahead(self._ready[0].sparse)
            yield batch

    def _read(self, batches: Iterator[Batch]) -> None:
        """Reads until the batches of a step, and one more, are on their way."""
        while len(self._ready) <= self._num_batches and self._num_read < self._num_steps * self._num_batches:
            batch = next(batches, None)
            if batch is None and world_size() == 1:
                return
            batch = self._filler if batch is None else batch
            self._num_read += 1
            self._filler = replace(self._filler, position=batch.position)
            with self._aside():
                self._ready.append(batch.to(self._device, non_blocking=True))

    def _between_forward_and_backward(self, *_: Any) -> None:
        with self._aside():
            for tables in self._tables:
                tables.ids_ahead.meet()

    def _aside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
