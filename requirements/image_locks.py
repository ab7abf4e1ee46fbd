"""Writes images/locks: the pins of requirements/cpu.txt that each image of images/catalogue.yaml needs. Run by ``make lock``.

An image for CUDA has the same versions, in the CUDA builds of torch and fbgemm, and the packages of CUDA that these ask for.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pip._vendor.packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).parent))

from lock import CPU_BUILDS, LOCK, ROOT, name_of, resolve

OUT = ROOT / "images" / "locks"

TRAINING = ("torchrec", "export", "s3")
EXTRAS: dict[str, tuple[str, ...]] = {
    "train-cpu": TRAINING,
    "train-cuda": TRAINING,
    "serve-cpu": ("serve",),
    "serve-cuda": ("serve",),
    "ray-worker": (*TRAINING, "ray", "tune"),
}
"""Extras of mlenv that an image holds. dev has the whole of requirements/cpu.txt."""
ONLY_TRAINING = {"fsspec", "jinja2", "lightning", "mlflow", "polars", "safetensors", "scipy", "tqdm"}
LEFT_OUT: dict[str, set[str]] = {"serve-cpu": {*ONLY_TRAINING, "torch"}, "serve-cuda": ONLY_TRAINING}
"""What mlenv asks for and an image does without, as ``left_out`` in the catalogue says too; another package may still ask for it."""

Metadata = Mapping[str, Any]


def main() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    on_cpu = metadata_by_name(resolve(["--requirement", str(LOCK)], "--no-deps"))
    on_cuda = on_cpu | cuda_metadata(on_cpu)
    OUT.mkdir(exist_ok=True)
    (OUT / "dev.txt").write_text(LOCK.read_text())
    for image, extras in EXTRAS.items():
        roots = [*package["dependencies"], *(line for extra in extras for line in package["optional-dependencies"][extra])]
        roots = [line for line in roots if name_of(line) not in LEFT_OUT.get(image, ())]
        is_cpu = image not in ("train-cuda", "serve-cuda")
        known = on_cpu if is_cpu else on_cuda
        builds = CPU_BUILDS if is_cpu else {}
        header = f"# What mlenv needs in the image {image}. Made from requirements/cpu.txt by `make lock`. Do not edit."
        names = sorted(needed_by(roots, known, builds, package))
        (OUT / f"{image}.txt").write_text("\n".join([header, *(f"{name}=={version_of(known[name])}" for name in names), ""]))
    print(f"wrote {OUT.relative_to(ROOT)}", file=sys.stderr)


def needed_by(roots: Iterable[str], known: Mapping[str, Metadata], builds: Mapping[str, str], package: Metadata) -> set[str]:
    """Packages that these requirements ask for, and what these ask for in turn.

    Args:
        builds: names that stand in for others.
        package: mlenv itself, whose extras ask for each other.
    """
    found: set[str] = set()
    waiting = [Requirement(line) for line in roots]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name, extras = builds.get(name_of(requirement.name), name_of(requirement.name)), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name == package["name"]:
            waiting += [Requirement(line) for extra in extras for line in package["optional-dependencies"][extra]]
            continue
        found.add(name)
        waiting += asked_for(known[name], extras)
    return found


def asked_for(metadata: Metadata, extras: Collection[str]) -> Iterator[Requirement]:
    """What a package asks for on this machine, with some of its extras."""
    for requirement in map(Requirement, metadata.get("requires_dist", ())):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def cuda_metadata(on_cpu: Mapping[str, Metadata]) -> dict[str, Metadata]:
    """The CUDA builds, which are those of PyPI itself, with all that they ask for, at the versions of the lock."""
    builds = {cpu: cuda for cuda, cpu in CPU_BUILDS.items()}
    wanted = [f"{builds.get(name, name)}=={version_of(on_cpu[name])}" for name in ("torch", *builds)]
    own = {"PIP_CONFIG_FILE", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"}
    kept = {name: os.environ.pop(name) for name in own & os.environ.keys()}
    try:
        os.environ["PIP_CONFIG_FILE"] = os.devnull  # a folder or an index of this machine may offer the CPU build
        return metadata_by_name(resolve(wanted, "--constraint", str(LOCK)))
    finally:
        del os.environ["PIP_CONFIG_FILE"]
        os.environ.update(kept)


def metadata_by_name(packages: Iterable[Mapping[str, Any]]) -> dict[str, Metadata]:
    return {name_of(package["metadata"]["name"]): package["metadata"] for package in packages}


def version_of(metadata: Metadata) -> str:
    """Without the local part, as in the lock."""
    return str(metadata["version"]).partition("+")[0]


if __name__ == "__main__":
    main()
