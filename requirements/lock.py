"""Writes requirements/cpu.txt: one exact version of every package that mlenv, its extras and its tools need on a CPU.

Run by ``make lock``. pip alone cannot make this lock, because torchrec depends on the CUDA build of fbgemm, which does not
load on a host without CUDA. Here torchrec is resolved by itself, its dependencies join the others, and fbgemm's CPU build
takes the place of the CUDA one. The result no longer satisfies torchrec's metadata, so it is installed with ``--no-deps``.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu.txt"

CPU_BUILDS = {"fbgemm-gpu": "fbgemm-gpu-cpu"}
"""Packages whose CPU build has a name of its own."""

RESOLVED_ALONE = "torchrec"
"""Its dependencies are taken over, renamed to CPU builds."""

GPU_ONLY = re.compile(r"(nvidia|cuda)-|triton$")
"""Packages that torch's CUDA build asks for and its CPU build does not."""


def main() -> None:
    wanted = list(requirements(tomllib.loads((ROOT / "pyproject.toml").read_text())))
    print(f"resolving {len(wanted)} requirements of pyproject.toml", file=sys.stderr)
    (alone,) = resolve([line for line in wanted if name_of(line) == RESOLVED_ALONE], "--no-deps")
    others = {cpu_build(line) for line in wanted if name_of(line) != RESOLVED_ALONE}
    taken_over = {cpu_build(line) for line in alone["metadata"]["requires_dist"] if "extra ==" not in line}
    LOCK.write_text(lock_text([alone, *resolve(sorted(others | taken_over))]))
    print(f"wrote {LOCK.relative_to(ROOT)}", file=sys.stderr)


def requirements(project: dict[str, Any]) -> Iterator[str]:
    """Everything that pyproject.toml names, except the package itself."""
    package = project["project"]
    for table in (project["build-system"]["requires"], package["dependencies"], *package["optional-dependencies"].values()):
        yield from (line for line in table if name_of(line) != package["name"])


def resolve(wanted: list[str], *options: str) -> list[dict[str, Any]]:
    """What pip would install into an empty environment."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-qq", "--report", "-", *options, *wanted]
    report = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    installed: list[dict[str, Any]] = json.loads(report)["install"]
    return installed


def lock_text(packages: Iterable[dict[str, Any]]) -> str:
    """The lock, sorted by name, without local versions such as ``+cpu``: the index decides which build it offers."""
    pins = {name_of(package["metadata"]["name"]): package["metadata"]["version"].split("+")[0] for package in packages}
    python = f"Python {sys.version_info.major}.{sys.version_info.minor} on {platform.system()} {platform.machine()}"
    header = [
        f"# Made from pyproject.toml by `make lock`, with {python}. Do not edit.",
        "# Install with: pip install --no-deps -r requirements/cpu.txt",
    ]
    return "\n".join([*header, *(f"{name}=={version}" for name, version in sorted(pins.items()) if not GPU_ONLY.match(name)), ""])


def cpu_build(requirement: str) -> str:
    """The same requirement on the CPU build of the package."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    return CPU_BUILDS.get(name_of(name), name) + requirement[len(name) :]


def name_of(requirement: str) -> str:
    """The normalized name of the package that a requirement is about."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


if __name__ == "__main__":
    main()
