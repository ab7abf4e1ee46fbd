"""A training as a job of a scheduler: a RayJob or a PyTorchJob for Kubernetes, a batch script for Slurm."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

import yaml

from mlenv.config import LAUNCHERS, ExperimentConfig
from mlenv.errors import DONE, GATE, STOPPED, WRONG_INPUT, ConfigError, MlenvError, Problems
from mlenv.kinds import kind_of

_LAUNCHER: Final = {"rayjob": "ray", "pytorchjob": "torchrun", "slurm": "torchrun"}
"""Kinds of jobs, and who starts the processes of each."""

KINDS: Final = tuple(_LAUNCHER)

_NAME_LENGTH: Final = 47
"""KubeRay adds to the name of a RayJob, and Kubernetes takes 63 letters."""


def render(config: ExperimentConfig, kind: str, arguments: Sequence[str]) -> str:
    """The text of the job.

    Args:
        kind: one of KINDS.
        arguments: of ``mlenv``, with the config as the job finds it: in the image, or in the folder that sbatch is called in.

    Raises:
        Problems: names all that the scheduler would refuse or the training would wait for.
    """
    problems = list(_problems(config, kind))
    if problems:
        raise Problems(f"{kind} of {config.name!r}", problems)
    if kind == "slurm":
        return _slurm(config, arguments)
    make: Callable[[ExperimentConfig, Sequence[str]], dict[str, Any]] = {"rayjob": _ray_job, "pytorchjob": _pytorch_job}[kind]
    return yaml.safe_dump(make(config, arguments), sort_keys=False, width=200)


def ray_arguments(arguments: Sequence[str]) -> list[str]:
    """Of a training that is itself started on the cluster that it trains on."""
    return [*arguments, "launch.address=auto"]


def _problems(config: ExperimentConfig, kind: str) -> list[MlenvError]:
    job, launch = config.job, config.launch
    found: list[MlenvError] = []
    launcher = kind_of(launch, LAUNCHERS)
    if launcher != _LAUNCHER[kind]:
        fix = f"add launch={_LAUNCHER[kind]}"
        return [ConfigError("launch.kind", expected=f"{_LAUNCHER[kind]} in a {kind}", received=launcher, fix=fix)]
    if launcher == "ray":
        for name in ("cpus", "gpus"):
            needed, there = launch.num_processes * getattr(launch, f"{name}_per_process"), job.nodes * getattr(job, f"{name}_per_node")
            if needed > there:
                fix = f"raise job.nodes or job.{name}_per_node"
                found.append(ConfigError(f"job.{name}_per_node", expected=f"{needed} {name} on all nodes", received=there, fix=fix))
    elif job.gpus_per_node not in (0, launch.num_processes):
        expected = f"job.gpus_per_node, {job.gpus_per_node}: the processes of a node"
        found.append(ConfigError("launch.num_processes", expected=expected, received=launch.num_processes))
    elif job.cpus_per_node < launch.num_processes:
        expected = f"at least {launch.num_processes}, a CPU for each process of a node"
        found.append(ConfigError("job.cpus_per_node", expected=expected, received=job.cpus_per_node))
    if kind == "slurm":
        return found
    if not job.image:
        found.append(ConfigError("job.image", expected="a container image", received="", fix="job.image=REGISTRY/NAME:TAG"))
    output = PurePosixPath(config.output)
    if not any(output.is_relative_to(folder) for folder in job.claims.values()):
        fix = "job.claims={CLAIM: /FOLDER} and output=/FOLDER/NAME"
        expected = f"a folder of job.claims ({', '.join(job.claims.values()) or 'none'}), because all else ends with its pod"
        found.append(ConfigError("output", expected=expected, received=config.output, fix=fix))
    if not re.search("[a-zA-Z0-9]", config.name):
        found.append(ConfigError("name", expected="letters or digits, for the name of the job", received=config.name))
    return found


def _name(config: ExperimentConfig) -> str:
    """As Kubernetes takes it: small letters, digits and dashes, beginning with a letter."""
    name = re.sub("[^a-z0-9]+", "-", config.name.lower()).strip("-")
    return (name if name[0].isalpha() else f"mlenv-{name}")[:_NAME_LENGTH].rstrip("-")


def _metadata(config: ExperimentConfig) -> dict[str, Any]:
    labels = {"app.kubernetes.io/managed-by": "mlenv"} | dict(config.job.labels)
    return {"name": _name(config), "labels": labels} | ({"namespace": config.job.namespace} if config.job.namespace else {})


def _pod(config: ExperimentConfig, container: str, command: Sequence[str] = ()) -> dict[str, Any]:
    """The template of a pod with one container and the whole of a node's share."""
    job = config.job
    resources = {"cpu": str(job.cpus_per_node)}
    resources |= {"memory": f"{job.memory_gib_per_node}Gi"} if job.memory_gib_per_node else {}
    resources |= {"nvidia.com/gpu": str(job.gpus_per_node)} if job.gpus_per_node else {}
    made: dict[str, Any] = {"name": container, "image": job.image, "resources": {"requests": resources, "limits": resources.copy()}}
    made |= {"command": list(command)} if command else {}
    made |= {"env": [{"name": name, "value": value} for name, value in job.env.items()]} if job.env else {}
    spec: dict[str, Any] = {"containers": [made], "terminationGracePeriodSeconds": job.stop_seconds}
    if job.claims:
        volumes = {claim: f"claim-{place}" for place, claim in enumerate(job.claims)}
        made["volumeMounts"] = [{"name": volumes[claim], "mountPath": folder} for claim, folder in job.claims.items()]
        spec["volumes"] = [{"name": volume, "persistentVolumeClaim": {"claimName": claim}} for claim, volume in volumes.items()]
    spec |= {"serviceAccountName": job.service_account} if job.service_account else {}
    return {"metadata": {"labels": dict(job.labels)}, "spec": spec} if job.labels else {"spec": spec}


def _ray_job(config: ExperimentConfig, arguments: Sequence[str]) -> dict[str, Any]:
    """The head is a node like the others: it trains too."""
    job = config.job
    cluster: dict[str, Any] = {"headGroupSpec": {"rayStartParams": {}, "template": _pod(config, "ray-head")}}
    if job.nodes > 1:
        others = {"replicas": job.nodes - 1, "minReplicas": job.nodes - 1, "maxReplicas": job.nodes - 1}
        template = _pod(config, "ray-worker")
        cluster["workerGroupSpecs"] = [{"groupName": "workers", **others, "rayStartParams": {}, "template": template}]
    spec = {
        "entrypoint": shlex.join(["mlenv", *ray_arguments(arguments)]),
        "shutdownAfterJobFinishes": True,
        "backoffLimit": config.launch.max_restarts,  # with a new cluster, should the head be lost
        "rayClusterSpec": cluster,
    }
    spec |= {"activeDeadlineSeconds": job.time_limit_minutes * 60} if job.time_limit_minutes else {}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _metadata(config), "spec": spec}


def _pytorch_job(config: ExperimentConfig, arguments: Sequence[str]) -> dict[str, Any]:
    """torchrun on every node. Kubernetes itself fills in ``$(NAME)``, which the operator sets."""
    job, launch = config.job, config.launch
    command = ["torchrun", f"--nnodes={job.nodes}", f"--nproc-per-node={launch.num_processes}", "--node-rank=$(RANK)"]
    command += ["--master-addr=$(MASTER_ADDR)", "--master-port=$(MASTER_PORT)", "-m", "mlenv", *arguments]
    replicas = {"Master": 1} | ({"Worker": job.nodes - 1} if job.nodes > 1 else {})
    policy = {"backoffLimit": launch.max_restarts, "cleanPodPolicy": "Running"}
    policy |= {"activeDeadlineSeconds": job.time_limit_minutes * 60} if job.time_limit_minutes else {}
    specs = {
        name: {"replicas": number, "restartPolicy": "OnFailure", "template": _pod(config, "pytorch", command)}
        for name, number in replicas.items()
    }
    spec = {"nprocPerNode": str(launch.num_processes), "runPolicy": policy, "pytorchReplicaSpecs": specs}
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": _metadata(config), "spec": spec}


_SLURM: Final = """\
#!/bin/bash
{options}
# Written by mlenv job render.

{env}MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

for attempt in $(seq 0 {max_restarts}); do
    # The first process that ends ends no other: one that was told to stop has still to say so.
    # shellcheck disable=SC2016 # each process fills in its own
    srun --kill-on-bad-exit=0 --wait=0 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' \\
        bash {command}
    code=$?
    case $code in
        {final}) exit $code ;;
        {stopped}) # told to stop, with a checkpoint: the same job goes on from there
            scontrol requeue "$SLURM_JOB_ID"
            exit $code
            ;;
    esac
    echo "mlenv: attempt $attempt ended with exit code $code" >&2
done
exit $code
"""


def _in_container(config: ExperimentConfig) -> list[str]:
    """What a command of a Slurm job is given to, so that it runs in the image; the folder and the environment are those outside."""
    job = config.job
    return ["apptainer", "exec", *(["--nv"] if job.gpus_per_node else []), f"docker://{job.image}"] if job.image else []


def _slurm(config: ExperimentConfig, arguments: Sequence[str]) -> str:
    """srun starts every process, as torchrun would, and keeps the exit code, which torchrun does not."""
    job, launch = config.job, config.launch
    options: dict[str, object] = {
        "job-name": _name(config),
        "nodes": job.nodes,
        "ntasks-per-node": launch.num_processes,
        "cpus-per-task": job.cpus_per_node // launch.num_processes,
    }
    options |= {"gpus-per-node": job.gpus_per_node} if job.gpus_per_node else {}
    options |= {"mem": f"{job.memory_gib_per_node}G"} if job.memory_gib_per_node else {}
    options |= {"time": job.time_limit_minutes} if job.time_limit_minutes else {}
    options |= {"partition": job.partition} if job.partition else {}
    options |= {"signal": f"USR1@{job.stop_seconds}", "open-mode": "append"}
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items()]
    return _SLURM.format(
        options="\n".join([*lines, "#SBATCH --requeue"]),
        env="".join(f"export {name}={shlex.quote(value)}\n" for name, value in job.env.items()),
        max_restarts=launch.max_restarts,
        command=shlex.join([*_in_container(config), "mlenv", *arguments]),
        final=f"{DONE} | {WRONG_INPUT} | {GATE}",
        stopped=STOPPED,
    )
