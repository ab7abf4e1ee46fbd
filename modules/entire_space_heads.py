"""Heads of tasks that can only happen after one another, over all examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

import torch
from torch import Tensor, nn

from mlenv.errors import ConfigError, nearest


class EntireSpaceHeads(nn.Module):
    """Reads the logit of a task as conditional on an earlier one and returns the logit of both happening: ESMM.

    ``p(conversion) = p(click) * p(conversion | click)``. Written with the logits a and b of the factors, the logit of the
    product is ``-log(exp(-a) + exp(-b) + exp(-a - b))``, which neither overflows nor loses digits at either end, and whose
    derivatives lie in [0, 1]. Chains such as refund after conversion after click multiply all factors.

    The conditional factor is never trained on clicked examples alone, where it would learn a biased sample; it learns
    through the product, on every impression. So the label of conversion says whether click *and* conversion happened,
    which is 0 without a click, and must not be masked by click. The conditional probability is the ratio of both predictions.

    Args:
        heads: turn the inputs into one logit per task.
        tasks: names of the columns of the logits.
        given: the earlier task that each conditional task follows.

    Raises:
        ConfigError: ``given`` names what is no task, or goes round in a circle.

    Source: Ma et al., "Entire Space Multi-Task Model", SIGIR 2018, arXiv:1804.07931, section 2.3.
    """

    def __init__(self, heads: nn.Module, tasks: Sequence[str], given: Mapping[str, str]) -> None:
        super().__init__()
        self.heads = heads
        for task, earlier in given.items():
            for name, key in ((task, "entire_space"), (earlier, f"entire_space.{task}")):
                if name not in tasks:
                    raise ConfigError(key, expected="a task of schema.labels", received=name, fix=nearest(name, tasks))
        try:
            order = TopologicalSorter({task: [earlier] for task, earlier in given.items()}).static_order()
            self._steps = [(tasks.index(task), tasks.index(given[task])) for task in order if task in given]
        except CycleError as error:
            circle = " after ".join(reversed(error.args[1]))
            raise ConfigError("entire_space", expected="tasks in an order of time", received=circle) from None

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """
        Args:
            inputs: what the heads take.

        Returns:
            logits ``(batch, tasks)`` float32, each of its task over the entire space.
        """
        columns = list(self.heads(inputs).unbind(1))
        for task, earlier in self._steps:
            first, second = -columns[earlier], -columns[task]
            columns[task] = -torch.logsumexp(torch.stack([first, second, first + second]), dim=0)
        return torch.stack(columns, dim=1)
