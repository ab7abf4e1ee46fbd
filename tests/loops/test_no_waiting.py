"""Between two records no step asks for a number of a tensor: on a GPU it would wait there for all that was given to it before."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlenv import Experiment, compose
from mlenv.loops.read_ahead import ReadAheadStep

ASKING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "_coalesce"}
"""Operators whose result, or its shape, is read by the host."""


class WaitedError(Exception):
    pass


class NoWaiting(TorchDispatchMode):
    """Raises where a device would be waited for. Lists of a tensor's numbers are made without an operator, so they are caught apart."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.overloadpacket.__name__ in ASKING:
            raise WaitedError(str(function))
        return function(*arguments, **(named or {}))


def no_lists(tensor):
    raise WaitedError("tolist")


# Not over TorchRec's tables, which read counters of the host, as if a device had them; and not with PyTorch's row-wise Adagrad, which
# adds up the gradients of a row: a GPU tells how many rows there are.
@pytest.mark.parametrize(
    "settings",
    [
        ["loop.learning_rate_decay=cosine", "loop.warmup_steps=2", "model.experts.kind=mmoe", "embeddings.optimizer=sgd"],
        ["optimizer.gradient_clip_norm=1", "loop.accumulate_batches=2", "loop.ema_decay=0.9", "embeddings.optimizer=sgd"],
        ["objective.balance.kind=uncertainty", "embeddings.optimizer=adam", "loop.max_loss=100", "optimizer.kind=lion"],
    ],
    ids=["scheduled", "accumulated", "balanced"],
)
def test_only_a_record_waits_for_the_device(demo_arguments, monkeypatch, settings):
    arguments = demo_arguments(*settings, "loop.log_every_steps=3", "loop.read_ahead=true")
    config = compose(arguments[0], arguments[1:])
    with Experiment(config, sees_every_loss=False) as experiment:
        assert isinstance(experiment.step._step, ReadAheadStep)
        batches, progress = experiment.source("train").batches(), experiment.run.restore()
        # The rows are on the host, and reading them may look at them.
        batches = iter([batch for batch, _ in zip(batches, range(12), strict=False)])
        for step in range(3):
            monkeypatch.setattr(torch.Tensor, "tolist", no_lists)
            with NoWaiting():
                output = experiment.step.advance(batches, progress)
                progress = progress.after(output)
                with pytest.raises(WaitedError) if step == 2 else nullcontext():
                    experiment.run.log(progress, output)
        monkeypatch.undo()
