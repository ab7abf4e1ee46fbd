"""Ids of later batches on their way to the ranks that hold their rows."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from mlenv.batch import SparseFeatures


@dataclass
class _Sent:
    """The ids of one lookup of a batch."""

    lookup: str
    sparse: SparseFeatures
    context: Any
    """TorchRec's notes about the lookup."""
    ids: Any
    """What is awaited: that all ranks know how many ids come, and then that the ids are there."""
    stream: torch.cuda.Stream | None
    """Of the GPU that sends them; None on a CPU."""
    has_met: bool = False


class IdsAhead:
    """Splits the lookup of a sharded collection of TorchRec in two: the ids are sent while the step before still computes.

    TorchRec's own pipelines do the same, for models whose lookups read an attribute of the batch as it is.
    """

    def __init__(self) -> None:
        self._sent: list[_Sent] = []

    def send(self, collection: Any, lookup: str, sparse: SparseFeatures, ids: Any) -> None:
        """Tells the other ranks how many ids of a later batch they will get; waits for nothing."""
        context = collection.create_context()
        stream = torch.cuda.current_stream() if sparse.values.is_cuda else None
        self._sent.append(_Sent(lookup, sparse, context, collection.input_dist(context, ids), stream))

    def meet(self) -> None:
        """Sends the ids themselves, once every rank knows how many come."""
        for sent in (sent for sent in self._sent if not sent.has_met):
            with _in(sent.stream):
                sent.ids, sent.has_met = sent.ids.wait(), True

    def forget(self) -> None:
        """Gives up what was sent and not looked up."""
        self._sent.clear()

    def look_up(self, collection: Any, lookup: str, sparse: SparseFeatures) -> Any:
        """What the collection finds for a batch whose ids were sent ahead; None for any other batch."""
        sent = next((sent for sent in self._sent if sent.sparse is sparse and sent.lookup == lookup), None)
        if sent is None:
            return None
        self.meet()
        self._sent.remove(sent)
        with _in(sent.stream):
            ids = sent.ids.wait()
        if sent.stream is not None:
            now = torch.cuda.current_stream()
            now.wait_stream(sent.stream)
            ids.record_stream(now)
            sent.context.record_stream(now)
        return collection.compute_and_output_dist(sent.context, ids)


def _in(stream: torch.cuda.Stream | None) -> Any:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
