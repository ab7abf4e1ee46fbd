"""What padding costs: DIN on jagged events, beside the same weights on padded ones."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.comparison import Result, markdown_table, median_ratio, paired_seconds
from mlenv.modules import EmbeddedSequence, TargetAttention, TargetAttentionConfig

BATCH_SIZE, EVENT_DIM, MEAN_LENGTH, MAX_LENGTH, REPETITIONS = 1024, 32, 10, 100, 15
TARGET = 1.5


def measure(folder: Path) -> Result:
    torch.manual_seed(0)
    attention = TargetAttentionConfig(candidate=("item",)).build(EVENT_DIM, EVENT_DIM)
    # Geometric on 0, 1, 2, ...: many short histories, some empty, a few that are cut.
    lengths = torch.empty(BATCH_SIZE).geometric_(1 / (MEAN_LENGTH + 1)).sub(1).clamp(max=MAX_LENGTH).int()
    values = torch.randn(int(lengths.sum()), EVENT_DIM, requires_grad=True)
    candidate = torch.randn(BATCH_SIZE, EVENT_DIM, requires_grad=True)

    def jagged() -> Tensor:
        result: Tensor = attention(EmbeddedSequence(values, lengths), candidate)
        return result

    longest = int(lengths.max())
    ways = {
        "jagged": jagged,
        f"padded to the longest of the batch ({longest})": padded(attention, values, lengths, candidate, longest),
        f"padded to the maximum ({MAX_LENGTH})": padded(attention, values, lengths, candidate, MAX_LENGTH),
    }
    for way in ways.values():
        torch.testing.assert_close(way(), jagged())
    seconds = paired_seconds({name: forward_and_backward(way) for name, way in ways.items()}, REPETITIONS)
    rows = [[name, f"{1e3 * statistics.median(seconds[name]):.1f}", f"{median_ratio(seconds, 'jagged', name):.2f}"] for name in ways]
    ratio = min(median_ratio(seconds, "jagged", name) for name in ways if name != "jagged")
    return Result(
        f"DIN: batch {BATCH_SIZE:,}, {EVENT_DIM} dims, {lengths.float().mean():.1f} events on average, at most {MAX_LENGTH}",
        markdown_table(["way", "ms, forward + backward", "jagged is faster by"], rows),
        f"On jagged events DIN is {ratio:.1f} times as fast as on the smaller padded tensor (target: at least {TARGET}).",
        ratio >= TARGET,
    )


def padded(attention: TargetAttention, values: Tensor, lengths: Tensor, candidate: Tensor, width: int) -> Callable[[], Tensor]:
    """The same attention over ``(batch, width)`` events; they are padded beforehand, which is not counted."""
    is_event = torch.arange(width) < lengths.unsqueeze(1)
    grid = torch.zeros(BATCH_SIZE, width, EVENT_DIM)
    grid[is_event] = values.detach()
    grid.requires_grad_()

    def forward() -> Tensor:
        asked = candidate.unsqueeze(1).expand(-1, width, -1)
        weights = attention.activation_unit(torch.cat([grid, asked, grid - asked, grid * asked], dim=2))
        pooled: Tensor = (weights.masked_fill(~is_event.unsqueeze(2), 0).transpose(1, 2) @ grid).squeeze(1)
        return pooled

    return forward


def forward_and_backward(way: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: way().sum().backward()
