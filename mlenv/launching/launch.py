"""Starting the processes of a training on this machine, and starting them again when one has died."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mlenv.config import Command, ExperimentConfig
from mlenv.errors import FAILED, GATE, STOPPED, WRONG_INPUT, check_at_least
from mlenv.loops.thread_budget import available_cores, compute_threads

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TorchrunConfig:
    """Processes of this machine, as torchrun starts them. torchrun itself starts them on several machines, with the same command."""

    num_processes: int = 1
    """Each takes a share of the rows and, with the engine torchrec, of the tables; with GPUs, one for each."""
    max_restarts: int = 3
    """How often all are started again, from the last checkpoint, when one of them has died."""

    def __post_init__(self) -> None:
        check_at_least("num_processes", self.num_processes, 1)
        check_at_least("max_restarts", self.max_restarts, 0)

    @property
    def starts_processes(self) -> bool:
        return self.num_processes > 1

    def run(self, config: ExperimentConfig, command: Command) -> int:
        """See ``mlenv.config.LauncherConfig``.

        Raises:
            ConfigError, Problems, DataError: see check_before_start.
        """
        check_before_start(config)
        decoding = config.data.workers.local_threads
        threads = compute_threads(available_cores(), num_processes=self.num_processes, decode_threads=decoding)
        return _run_in_processes(command.arguments, self.num_processes, self.max_restarts, threads)


def check_before_start(config: ExperimentConfig) -> None:
    """Looks at the config and the data before there are processes, so that what is wrong is said once.

    Raises:
        ConfigError, Problems, DataError: the model cannot be built, or a window cannot be read.
    """
    from mlenv.dry_run import check_parts
    from mlenv.experiment import SPLITS, Experiment

    check_parts(config)
    with Experiment(config) as experiment:
        for split in SPLITS:
            if getattr(config.data, split) is not None:
                experiment.source(split)


def _run_in_processes(arguments: Sequence[str], num_processes: int, max_restarts: int, num_threads: int) -> int:
    """Runs ``mlenv ARGUMENTS`` in each. When one dies the others are ended, and all start again from the last checkpoint.

    Returns:
        The exit code of the process that failed first, or 0.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))  # otherwise torch's launcher sets 1
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is said below, and by the process itself
    for attempt in range(max_restarts + 1):
        group = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=f"mlenv-{os.getpid()}-{attempt}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
        )
        try:
            elastic_launch(group, sys.executable)("-m", "mlenv", *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode in (WRONG_INPUT, GATE, STOPPED):  # another try would only repeat it
                return failure.exitcode
            last = failure.exitcode if failure.exitcode > 0 else FAILED
            logger.error(
                "rank %d ended with exit code %d%s", rank, failure.exitcode, "" if attempt == max_restarts else "; all start again"
            )
        except SignalException:  # sent on to all, which saved what they had
            return STOPPED
        else:
            return 0
    return last
