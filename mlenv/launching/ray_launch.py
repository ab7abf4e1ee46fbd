"""Training in processes of a Ray cluster: Ray Train places them, watches them and starts them again."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from mlenv.composition import from_plain, to_plain
from mlenv.config import WORKERS, Command, ExperimentConfig
from mlenv.datasets.ray_cluster import check_address, connect
from mlenv.errors import FAILED, ConfigError, MlenvError, StoppedError, TrainingError, check_at_least
from mlenv.kinds import kind_of
from mlenv.launching.launch import check_before_start

logger = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.2
"""How soon a signal to the launcher is noticed."""

_SENT_ON: Final = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MLFLOW_")
"""Beginnings of the names of environment variables that the processes of a training need as this one does."""

_QUIET: Final = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0"}
"""What a training prints and logs is its own affair."""


@dataclass(frozen=True, kw_only=True)
class RayLauncherConfig:
    """Processes on a Ray cluster, which is started on this machine or joined."""

    num_processes: int = 1
    """Over all nodes. Each takes a share of the rows and, with the engine torchrec, of the tables."""
    cpus_per_process: int = 1
    """CPUs that Ray sets aside for each, and its compute threads."""
    gpus_per_process: int = 0
    """0 trains on CPUs, 1 on a GPU for each."""
    address: str = ""
    """Cluster to join: auto for the one of this machine, or host:port. Empty starts one for the time of the training."""
    max_restarts: int = 3
    """How often all are started again, from the last checkpoint, when one of them has died."""

    def __post_init__(self) -> None:
        for name, least in (("num_processes", 1), ("cpus_per_process", 1), ("gpus_per_process", 0), ("max_restarts", 0)):
            check_at_least(name, getattr(self, name), least)
        if self.gpus_per_process > 1:
            fix = "raise launch.num_processes instead"
            raise ConfigError("gpus_per_process", expected="0 or 1, because a process has one", received=self.gpus_per_process, fix=fix)
        check_address(self.address)

    @property
    def starts_processes(self) -> bool:
        return True

    def run(self, config: ExperimentConfig, command: Command) -> int:
        """See ``mlenv.config.LauncherConfig``.

        Raises:
            ConfigError, Problems, DataError: see check_before_start; or no cluster answers; or a node sees other files.
            MlenvError: what a process raised that another try would only repeat.
            StoppedError: SIGTERM or SIGUSR1 came; the last step is in a checkpoint.
        """
        check_before_start(config)
        return _run_on_cluster(self, config, command)


@dataclass(frozen=True)
class _Ended:
    """How the command ended in the process of rank 0."""

    code: int
    said: str
    """What it printed."""
    stopped_by: str = ""


def _run_on_cluster(options: RayLauncherConfig, config: ExperimentConfig, command: Command) -> int:
    from mlenv.loops.stop_signals import StopSignals

    # What a job has in its environment its processes have too, and Ray takes nothing twice.
    env = _QUIET | {name: value for name, value in os.environ.items() if name.startswith(_SENT_ON) and name not in config.job.env}
    if not options.address:
        env["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody takes this machine away from its own cluster
    # Ray Train keeps a folder of its own, which stays empty: the checkpoints are ours.
    with StopSignals() as signals, tempfile.TemporaryDirectory() as storage, _token_beside(Path(config.output)) as token:
        signals.hold()
        ray = connect(options.address, "launch.address", num_cpus=_num_cpus(options, config), show_logs=True, env=env)
        pool = ThreadPoolExecutor(1)  # signals are heard here, in the main thread, while Ray Train runs there
        try:
            _check_room(ray.cluster_resources(), options)
            flag = ray.remote(num_cpus=0, max_concurrency=options.num_processes + 1)(_StopFlag).remote()
            work = partial(_work, to_plain(config), command, Path.cwd(), token, flag)
            training = pool.submit(_trainer(work, options, storage).fit)
            has_told = False
            while not wait([training], _POLL_SECONDS).done:
                if signals.received and not has_told:
                    flag.raise_for.remote(signals.received)
                    has_told = True
            return _outcome(training)
        finally:
            ray.shutdown()
            pool.shutdown(wait=False)


def _trainer(work: partial[_Ended], options: RayLauncherConfig, storage: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.callback import UserCallback
    from ray.train.v2.api.config import LoggingConfig

    class Restarts(UserCallback):
        """Runs beside Ray Train's controller: says that a process died, and lets no error be tried again that would only come back."""

        def after_exception(self, run_context: object, worker_exceptions: Mapping[int, BaseException]) -> None:
            for rank, error in worker_exceptions.items():
                cause = getattr(error, "_base_exc", error)
                if isinstance(cause, MlenvError) and not isinstance(cause, TrainingError):
                    raise cause
                logging.getLogger("mlenv").error("rank %d ended: %s", rank, str(cause).strip().partition("\n")[0])

    resources = {"CPU": options.cpus_per_process, "GPU": options.gpus_per_process}
    return TorchTrainer(
        work,  # type: ignore[arg-type]
        torch_config=TorchConfig(backend="nccl" if options.gpus_per_process else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=options.num_processes, use_gpu=bool(options.gpus_per_process), resources_per_worker=resources
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name="mlenv",
            storage_path=storage,
            failure_config=FailureConfig(max_failures=options.max_restarts),
            callbacks=[Restarts()],  # type: ignore[list-item]  # mypy sees the classes of Ray Train's first version
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _work(plain: dict[str, Any], command: Command, folder: Path, token: Path, flag: Any) -> _Ended:
    """Runs in each process of the training, once Ray Train has put its process group in place."""
    import ray

    if not token.exists():
        node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        fix = "set output to a folder that all nodes of the cluster share"
        raise ConfigError("output", expected=f"a folder that the node {node} sees too", received=str(token.parent), fix=fix)
    os.chdir(folder)  # as on the launcher's side, so that paths mean the same
    sys.path.insert(0, str(folder))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    logging.getLogger("mlenv").setLevel(logging.INFO)
    threading.Thread(target=_listen, args=(flag,), name="stop signals", daemon=True).start()
    config = from_plain(plain, ExperimentConfig)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            return _Ended(command.run(config), said.getvalue())
        except StoppedError as error:
            return _Ended(FAILED, said.getvalue(), stopped_by=str(error))


class _StopFlag:
    """An actor that tells the processes of a training of a signal that their launcher got."""

    def __init__(self) -> None:
        self._raised, self._name = threading.Event(), ""

    def raise_for(self, name: str) -> None:
        self._name = name
        self._raised.set()

    def wait(self) -> str:
        self._raised.wait()
        return self._name


def _listen(flag: Any) -> None:
    import ray

    from mlenv.loops.stop_signals import forward

    with contextlib.suppress(ray.exceptions.RayError):  # the training is over
        forward(ray.get(flag.wait.remote()))


def _outcome(training: Any) -> int:
    from ray.train import ControllerError, TrainingFailedError, WorkerGroupError

    try:
        ended: _Ended = training.result().return_value
    except ControllerError as error:
        cause = error.controller_failure
        while isinstance(cause, ControllerError):
            cause = cause.controller_failure
        if isinstance(cause, MlenvError):
            raise cause from error
        raise TrainingError(f"Ray Train: {cause}") from error
    except WorkerGroupError as error:
        first, failure = min(error.worker_failures.items())
        raise TrainingError(f"rank {first} ended: {failure}") from error
    except TrainingFailedError as error:
        raise TrainingError(f"Ray Train: {error}") from error
    sys.stdout.write(ended.said)
    if ended.stopped_by:
        raise StoppedError(ended.stopped_by)
    return ended.code


def _num_cpus(options: RayLauncherConfig, config: ExperimentConfig) -> int:
    """Of a cluster that has room for the training and for the workers that read its data."""
    readers = config.data.workers
    own = readers.num_workers * readers.cpus_per_task if kind_of(readers, WORKERS) == "ray" else 0  # type: ignore[attr-defined]
    return options.num_processes * (options.cpus_per_process + own)


def _check_room(resources: Mapping[str, float], options: RayLauncherConfig) -> None:
    """A cluster that was joined may grow; one that was started here does not."""
    for name, each in (("CPU", options.cpus_per_process), ("GPU", options.gpus_per_process)):
        needed, there = options.num_processes * each, resources.get(name, 0)
        if needed <= there:
            continue
        if not options.address:
            fix = "lower launch.num_processes, or join a larger cluster by launch.address"
            raise ConfigError(f"launch.{name.lower()}s_per_process", expected=f"at most {there:g} in all", received=needed, fix=fix)
        logger.warning("the cluster has %g %ss and the training needs %d: it starts when the cluster has grown", there, name, needed)


@contextlib.contextmanager
def _token_beside(output: Path) -> Iterator[Path]:
    """A file that every node of the cluster must see, because it must see the checkpoints."""
    token = output.resolve().parent / f".mlenv-{uuid.uuid4().hex}"
    token.touch()
    try:
        yield token
    finally:
        token.unlink(missing_ok=True)
