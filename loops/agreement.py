"""Decisions that all ranks of a training take together."""

from __future__ import annotations

import torch
import torch.distributed


def num_ranks() -> int:
    """Processes that train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def this_rank() -> int:
    """Number of this process among them."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def any_rank(fact: bool) -> bool:
    """Whether something is so on any rank; all ranks must ask at the same point. One process alone waits for nobody."""
    if num_ranks() == 1:
        return fact
    device = "cpu" if "gloo" in torch.distributed.get_backend() else "cuda"
    facts = torch.tensor(float(fact), device=device)
    torch.distributed.all_reduce(facts, torch.distributed.ReduceOp.MAX)
    return bool(facts.item())
