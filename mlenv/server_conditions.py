"""Whether the servers that a training may talk to answer: MLflow and Ray."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from importlib import metadata
from typing import Final

from mlenv.condition import NOT_LOADED, Condition
from mlenv.errors import MlenvError

_TIMEOUT_SECONDS: Final = 10


def mlflow_condition(uri: str) -> Condition:
    """Whether MLflow answers; nobody is asked when no place is named."""
    from mlenv.records.mlflow_outbox import without_password

    if not uri:
        return Condition("MLflow", "pass", "not named; trainings keep their runs in mlflow.db beside them")
    from mlenv.records.mlflow_store import asking, open_store

    try:
        client = open_store(uri)
        with asking(uri):
            client.search_experiments(max_results=1)
    except MlenvError as error:
        return Condition("MLflow", "fail", str(error), "" if "Fix:" in str(error) else "start the server, or name another place")
    except ImportError as error:
        return Condition("MLflow", "fail", f"{without_password(uri)} cannot be asked: {error}", "install mlflow")
    return Condition("MLflow", "pass", f"{without_password(uri)} answers")


def ray_condition(address: str) -> Condition:
    """Whether a Ray cluster answers, with the same version of Ray; nobody is asked when no address is named."""
    if not address:
        return Condition("Ray", "pass", "not named; launch=ray starts a cluster of its own")
    if not address.startswith(("http://", "https://")):
        return _joined(address)
    fix = "start the cluster, or name the address of its dashboard, such as http://HEAD:8265"
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=_TIMEOUT_SECONDS) as answer:
            version = re.search(rb'"ray_version":\s*"([^"]+)"', answer.read(10_000))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return Condition("Ray", "pass", f"{address} answers, and asks for a token")
        return Condition("Ray", "fail", f"{address}: {error}", fix)
    except (OSError, ValueError) as error:
        return Condition("Ray", "fail", f"{address}: {error}", fix)
    if version is None:
        return Condition("Ray", "fail", f"{address} answers, but is no dashboard of Ray", fix)
    there, here = version[1].decode(), _ray_version()
    if here and here != there:
        return Condition("Ray", "fail", f"{address} runs Ray {there}, here is {here}", f"install ray {there}, or use one image for both")
    return Condition("Ray", "pass", f"{address} answers, Ray {there}")


def _joined(address: str) -> Condition:
    from mlenv.datasets.ray_cluster import check_address, connect

    try:
        check_address(address)
        ray = connect(address, "ray", num_cpus=0)
    except MlenvError as error:
        return Condition("Ray", "fail", str(error), "" if "Fix:" in str(error) else "name auto, host:port or http://HEAD:8265")
    except NOT_LOADED as error:
        return Condition("Ray", "fail", f"{address} cannot be asked: {error}", "install mlenv[ray]")
    cpus = ray.cluster_resources().get("CPU", 0)
    ray.shutdown()
    return Condition("Ray", "pass", f"{address} answers, {cpus:.0f} CPUs")


def _ray_version() -> str:
    """Of the Ray that is installed here, if it is."""
    try:
        return metadata.version("ray")
    except metadata.PackageNotFoundError:
        return ""
