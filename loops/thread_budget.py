"""How the cores of a machine are divided between decoding rows and computing."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

SPARED: Final = 4
"""Decoding gets cores of its own where they are at most one of so many: fewer cores lose more by it than by sharing them."""


def available_cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: those of the machine, of its affinity, and of the quota of its container, whichever are fewest.

    Args:
        root: where the control groups are, of version 2 or 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(cores, math.ceil(_quota(root))), 1) if _quota(root) else cores


def compute_threads(cores: int, *, num_processes: int = 1, decode_threads: int = 0) -> int:
    """Threads that compute in each of the processes that share the cores.

    Threads of one step wait for each other: one that shares its core with something else holds all of them up. So decoding is
    given cores of its own, unless they are so few that computing would miss them more.
    """
    own = max(cores // num_processes, 1)
    return own - decode_threads if decode_threads * SPARED <= own else own


def _quota(root: Path) -> float:
    """Cores that a container may use in all; 0 for no limit."""
    try:
        if (root / "cpu.max").is_file():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota, period = ((root / "cpu" / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        return 0.0 if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return 0.0
