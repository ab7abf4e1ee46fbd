"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from types import ModuleType
from typing import Any, Final

from mlenv.errors import ConfigError, require

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS: Final = 10
"""Longest wait for a cluster to answer."""


def check_address(address: str) -> None:
    """
    Raises:
        ConfigError: it is neither auto, nor host:port, nor empty.
    """
    if not re.fullmatch(r"(auto|[^\s/:]+:\d+)?", address):
        raise ConfigError("address", expected="auto, host:port, or empty to start a cluster", received=address)


def keep_ray_train_quiet() -> None:
    """Runs in every process that works for this one. A part of Ray Train asks the dashboard every second whether the training is
    there: it warns each time that there is none, and takes one of several clusters of a machine for the wrong one."""
    import ray

    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


def connect(address: str, key: str, *, num_cpus: int, show_logs: bool = False, env: dict[str, str] | None = None) -> ModuleType:
    """Connects this process; gives the module ``ray``.

    Args:
        key: of the config, that an error names.
        num_cpus: of a cluster that is started.
        show_logs: whether what the processes write that work for this one is seen here.
        env: their environment variables.

    Raises:
        MlenvError: ray is not installed.
        ConfigError: no cluster answers at the address.
    """
    ray = require("ray", extra="ray")
    own: dict[str, Any] = {}
    if not address:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own = {"num_cpus": num_cpus, "include_dashboard": False}
    if show_logs:
        own["runtime_env"] = {"env_vars": env or {}, "worker_process_setup_hook": keep_ray_train_quiet}
    try:
        if ":" in address:  # where nobody listens, Ray would go on asking for minutes
            host, port = address.split(":")
            socket.create_connection((host, int(port)), TIMEOUT_SECONDS).close()
        handler = signal.getsignal(signal.SIGTERM)
        ray.init(address=address or "local", log_to_driver=show_logs, logging_level=logging.ERROR, **own)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own, put in its place, ends a training in the middle of a step
    except (OSError, OverflowError, RuntimeError, ValueError, ray.exceptions.RayError) as error:  # OverflowError: no such port
        fix = "start one with 'ray start --head', or leave address empty"
        raise ConfigError(key, expected="a Ray cluster that answers", received=f"{address} ({error})", fix=fix) from error
    logger.info("%s a Ray cluster with %d CPUs", "joined" if address else "started", ray.cluster_resources().get("CPU", 0))
    return ray
