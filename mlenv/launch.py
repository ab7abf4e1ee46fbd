"""Starting the processes of a training on this machine, and starting them again when one has died."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from mlenv.config import ExperimentConfig
from mlenv.dry_run import check_parts
from mlenv.errors import FAILED, GATE, STOPPED, WRONG_INPUT
from mlenv.experiment import SPLITS, Experiment
from mlenv.loops.thread_budget import available_cores, compute_threads

logger = logging.getLogger(__name__)


def launch(config: ExperimentConfig, arguments: Sequence[str]) -> int:
    """Runs ``mlenv ARGUMENTS`` in ``launch.num_processes`` processes that know each other, as torchrun does.

    When one dies the others are ended, and all start again from the last checkpoint, ``launch.max_restarts`` times.

    Args:
        config: checked here, so that what is wrong is said once.

    Returns:
        The exit code of the command: that of the process that failed first, or 0.

    Raises:
        ConfigError, Problems, DataError: the model cannot be built, or a window cannot be read.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check_parts(config)
    with Experiment(config) as experiment:
        for split in SPLITS:
            if getattr(config.data, split) is not None:
                experiment.source(split)
    num_processes = config.launch.num_processes
    threads = compute_threads(available_cores(), num_processes=num_processes, decode_threads=config.data.workers.local_threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # otherwise torch's launcher sets 1
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is said below, and by the process itself
    for attempt in range(config.launch.max_restarts + 1):
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
                "rank %d ended with exit code %d%s",
                rank,
                failure.exitcode,
                "" if attempt == config.launch.max_restarts else "; all start again",
            )
        except SignalException:  # sent on to all, which saved what they had
            return STOPPED
        else:
            return 0
    return last
