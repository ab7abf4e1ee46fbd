"""What a step costs and what it waits for: floating-point work, and the time without a batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mlenv.batch import Batch
from mlenv.loops.ranks import world_size
from mlenv.loops.train_step import StepOutput, TrainStep
from mlenv.loops.training_state import changing_buffers, put_back

if TYPE_CHECKING:
    from mlenv.loops.fit import Progress

PEAK_TFLOPS: Final[dict[str, tuple[float, float]]] = {
    "H200": (67.0, 989.0),
    "H100 PCIe": (51.0, 756.0),
    "H100": (67.0, 989.0),
    "A100": (19.5, 312.0),
    "L40S": (91.6, 362.0),
    "L4": (30.3, 121.0),
    "A10G": (31.5, 70.0),
    "A10": (31.2, 125.0),
    "V100": (15.7, 15.7),
    "T4": (8.1, 8.1),
}
"""Dense TFLOPS by a part of the name of a GPU, the longer part first: float32, and bfloat16 or, without it, float32 again. From the
makers' data sheets, without sparsity and without TF32, which mlenv does not switch on."""


def peak_tflops(device: torch.device, precision: str, given: float | None) -> float | None:
    """What the device can compute in a second at best; ``given`` comes first. None where nobody knows."""
    if given is not None or device.type != "cuda":
        return given
    name = torch.cuda.get_device_name(device)
    known = next((peaks for part, peaks in PEAK_TFLOPS.items() if part in name), None)
    return None if known is None else known[precision == "bf16-mixed"]


class StepMeter:
    """Watches another step; its gauges tell what happened since they were last asked for.

    The floating-point operations of a forward pass over the first batch are counted once, without training: matrix products and
    attention, as PyTorch counts them, and twice as many again for the backward pass. They are taken for those of any row.

    Args:
        peak: TFLOPS of the device at best; None where it is not known.
        filler: stands in for the first batch of a rank that has none.
    """

    def __init__(self, step: TrainStep, model: nn.Module, device: torch.device, filler: Batch, peak: float | None) -> None:
        self._step, self._model, self._device, self._filler, self._peak = step, model, device, filler, peak
        self._flops_per_example: float | None = None
        self._source: Iterator[Batch] | None = None
        self._batches: Iterator[Batch] = iter(())
        self._waited, self._examples, self._since = 0.0, 0, time.perf_counter()

    def advance(self, batches: Iterator[Batch], progress: Progress) -> StepOutput | None:
        """Lets the step train on the next batch."""
        if batches is not self._source:  # another training, or the first
            first = [] if self._flops_per_example is not None else list(islice(batches, 1))
            if self._flops_per_example is None:
                self._flops_per_example = self._count(*first or [self._filler])
            self._source, self._batches = batches, self._timed(chain(first, batches))
            self._waited, self._examples, self._since = 0.0, 0, time.perf_counter()
        output = self._step.advance(self._batches, progress)
        self._examples += 0 if output is None else output.num_examples
        return output

    def gauges(self) -> dict[str, float]:
        """Share of the time without a batch, and the work of a second, of one device."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        values = {"data_wait_share": min(self._waited / seconds, 1.0)}
        if self._flops_per_example:
            tflops = self._examples * self._flops_per_example / seconds / 1e12 / world_size()
            values["tflops_per_second"] = tflops
            if self._peak is not None:
                values["model_flops_utilization"] = tflops / self._peak
        self._waited, self._examples, self._since = 0.0, 0, time.perf_counter()
        return values

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def _count(self, batch: Batch) -> float:
        return 3 * forward_flops(self._model, batch.to(self._device)) / max(len(batch), 1)


def forward_flops(model: nn.Module, batch: Batch) -> int:
    """Floating-point operations of a forward pass, which changes nothing."""
    was_training, buffers = model.training, changing_buffers(model)
    before = [buffer.clone() for buffer in buffers]
    model.eval()
    try:
        with torch.no_grad(), _Counter() as counter:
            model(batch)
    finally:
        model.train(was_training)
        put_back(buffers, before)
    return int(counter.flops)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """PyTorch's FlopCounterMode without its hooks on every module, which TorchRec's lookups on several processes do not bear."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        result = function(*arguments, **named)
        if (count := flop_registry.get(function._overloadpacket)) is not None:
            self.flops += int(count(*arguments, **named, out_val=result))
        return result
