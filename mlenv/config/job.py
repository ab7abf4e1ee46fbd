"""What a scheduler gives a training: ``job`` of a config."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from mlenv.errors import ConfigError, check_at_least

_IMAGE: Final = re.compile(r"[a-z0-9][a-zA-Z0-9._/:-]*(@sha256:[0-9a-f]{64})?")


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Machines for a training, as ``mlenv job`` asks Kubernetes, Slurm or a Ray cluster for them. ``launch`` says how many processes."""

    nodes: int = 1
    """Machines, or pods, that are all alike."""
    cpus_per_node: int = 1
    gpus_per_node: int = 0
    memory_gib_per_node: int = 0
    """0 leaves it to the scheduler."""
    time_limit_minutes: int = 0
    """0 leaves it to the scheduler."""
    stop_seconds: int = 120
    """From the signal to the end: longer than a step, an evaluation and a checkpoint take together."""
    labels: dict[str, str] = field(default_factory=dict)
    """Of the job and its pods on Kubernetes."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of all processes. Whoever may see the job sees them: keep passwords in secrets of the cluster."""
    image: str = ""
    """Container image with mlenv, NAME:TAG or NAME@sha256:DIGEST, which stays the same for ever. Kubernetes needs one, with the model repo
    in its working directory; under Slurm Apptainer runs the processes in it, with the folder that sbatch is called in."""
    namespace: str = ""
    """Of Kubernetes; empty for the one that kubectl is set to."""
    service_account: str = ""
    """Of the pods; empty for the namespace's own."""
    claims: dict[str, str] = field(default_factory=dict)
    """Persistent volume claims of the pods, and the folder of each. The output folder lies in one."""
    partition: str = ""
    """Of Slurm; empty for its default."""

    def __post_init__(self) -> None:
        least = {"nodes": 1, "cpus_per_node": 1, "gpus_per_node": 0, "memory_gib_per_node": 0, "time_limit_minutes": 0, "stop_seconds": 1}
        for name, smallest in least.items():
            check_at_least(name, getattr(self, name), smallest)
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ConfigError("env", expected="names of environment variables", received=name)
        for claim, folder in self.claims.items():
            if not folder.startswith("/"):
                raise ConfigError(f"claims.{claim}", expected="an absolute folder", received=folder)
        for name in ("namespace", "service_account", *(f"claims.{claim}" for claim in self.claims)):
            text = name.partition(".")[2] or getattr(self, name)
            if text and not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", text):
                raise ConfigError(name, expected="a name of Kubernetes: small letters, digits and dashes", received=text)
        if self.image and not _IMAGE.fullmatch(self.image):
            expected = "NAME:TAG or NAME@sha256:DIGEST, the digest of 64 small hexadecimal digits"
            raise ConfigError("image", expected=expected, received=self.image, fix="mlenv image push prints it")
        if not re.fullmatch(r"[\w.,-]*", self.partition):
            raise ConfigError("partition", expected="a name of Slurm", received=self.partition)
