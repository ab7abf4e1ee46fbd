"""Handing a training to a Ray cluster that runs somewhere else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from shlex import join
from typing import Any

from mlenv.config import LAUNCHERS, ExperimentConfig
from mlenv.errors import DONE, FAILED, ConfigError, MlenvError, Problems, require
from mlenv.kinds import kind_of
from mlenv.launching.job_manifests import ray_arguments


def check_job(config: ExperimentConfig) -> None:
    """
    Raises:
        Problems: the training is not one for a cluster, or names folders that only this machine knows.
    """
    found: list[MlenvError] = []
    launcher = kind_of(config.launch, LAUNCHERS)
    if launcher != "ray":
        found.append(ConfigError("launch.kind", expected="ray in a job of a Ray cluster", received=launcher, fix="add launch=ray"))
    for key, path in (("output", config.output), ("data.path", config.data.path)):
        if not PurePosixPath(path).is_absolute() and "://" not in path:
            expected = "a path that is the same on every node of the cluster"
            found.append(ConfigError(key, expected=expected, received=path, fix="give an absolute one, on a disk that they share"))
    if found:
        raise Problems(f"job of {config.name!r}", found)


def submit(config: ExperimentConfig, arguments: Sequence[str], address: str) -> str:
    """Sends this folder, without what git ignores, and starts the training there; gives the id of the job.

    Raises:
        ConfigError: no cluster answers at the address.
    """
    check_job(config)
    client = _client(address)
    runtime_env = {"working_dir": os.getcwd(), "env_vars": dict(config.job.env)}
    job: str = client.submit_job(entrypoint=join(["mlenv", *ray_arguments(arguments)]), runtime_env=runtime_env)
    return job


def follow(job: str, address: str, write: Callable[[str], object]) -> int:
    """Writes what the job says until it ends; gives the exit code: 0, or 1 where it failed or was stopped."""
    client = _client(address)

    async def read() -> None:
        async for text in client.tail_job_logs(job):
            write(text)

    asyncio.run(read())
    return DONE if str(client.get_job_status(job).value) == "SUCCEEDED" else FAILED


def _client(address: str) -> Any:
    sdk, exceptions = require("ray.job_submission", extra="ray"), require("ray.exceptions", extra="ray")
    try:
        return sdk.JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, exceptions.RayError) as error:  # RayError: it asks for a token
        expected = "the address of a Ray cluster's dashboard that answers, such as http://HEAD:8265"
        raise ConfigError("--address", expected=expected, received=f"{address} ({' '.join(str(error).split())})") from error
