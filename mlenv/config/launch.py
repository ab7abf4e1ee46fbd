"""How many processes train together: ``launch`` of a config."""

from __future__ import annotations

from dataclasses import dataclass

from mlenv.errors import check_at_least


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How many processes of this machine train together. torchrun starts processes on several machines, with the same command."""

    num_processes: int = 1
    """Each takes a share of the rows and, with the engine torchrec, of the tables; with GPUs, one for each."""
    max_restarts: int = 3
    """How often all are started again, from the last checkpoint, when one of them has died."""

    def __post_init__(self) -> None:
        check_at_least("num_processes", self.num_processes, 1)
        check_at_least("max_restarts", self.max_restarts, 0)
