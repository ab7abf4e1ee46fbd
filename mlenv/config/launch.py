"""Which processes train together: ``launch`` of a config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mlenv.kinds import class_of

if TYPE_CHECKING:
    from mlenv.config.experiment import ExperimentConfig


@dataclass(frozen=True)
class Command:
    """What each of the processes does."""

    arguments: tuple[str, ...]
    """Of ``mlenv``, for a launcher whose processes are started by them."""
    run: Callable[[ExperimentConfig], int]
    """The same, for one whose processes are there already; gives the exit code."""


class LauncherConfig(Protocol):
    """Starts the processes of a training, and starts them again when one has died. It changes nothing about what they train."""

    @property
    def num_processes(self) -> int:
        """Each takes a share of the rows."""

    @property
    def max_restarts(self) -> int:
        """How often all are started again when one has died."""

    @property
    def starts_processes(self) -> bool:
        """False where the process that was given the command does all itself."""

    def run(self, config: ExperimentConfig, command: Command) -> int:
        """Returns the exit code of the command, once all processes have ended."""


LAUNCHERS: dict[str, type | str] = {
    "ray": "mlenv.launching.ray_launch:RayLauncherConfig",
    "torchrun": "mlenv.launching.launch:TorchrunConfig",
}
"""Launchers by the name that ``launch.kind`` takes."""


def torchrun() -> LauncherConfig:
    config: LauncherConfig = class_of("torchrun", LAUNCHERS, "launch")()
    return config
