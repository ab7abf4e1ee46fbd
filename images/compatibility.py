"""Versions that go together: refused before anything is built, not found out at import."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mlenv.doctor import PACKAGES, compatibility_conditions, compatible_versions
from mlenv.errors import ConfigError
from mlenv.images.spec import ImageSpec

_WRONG_BUILDS = {"cpu": "fbgemm-gpu", "cuda": "fbgemm-gpu-cpu"}
"""The build of fbgemm that does not load on an accelerator."""


def version_problems(spec: ImageSpec, pinned: Mapping[str, str]) -> Iterator[ConfigError]:
    """What the pinned versions have against each other, and against the accelerator.

    Args:
        pinned: versions by package, of the lock and beside it.
    """
    versions = {name: pinned[package] for name, packages in PACKAGES.items() for package in packages if package in pinned}
    place = "lock" if spec.lock else "python_packages"
    for condition in compatibility_conditions(versions, compatible_versions()):
        if condition.severity != "pass":
            yield ConfigError(place, expected="versions that are built for each other", received=condition.found, fix=condition.fix)
    wrong = _WRONG_BUILDS[spec.accelerator]
    if wrong in pinned:
        right = _WRONG_BUILDS["cuda" if spec.accelerator == "cpu" else "cpu"]
        fix = f"take {right}, or set accelerator"
        yield ConfigError(place, expected=f"the build of fbgemm for {spec.accelerator}", received=wrong, fix=fix)
    for name in spec.extras:
        packages = PACKAGES.get(name, (name,))
        if not any(package in pinned for package in packages):
            yield ConfigError("extras", expected="a package of the lock", received=name, fix=f"add {name} to the lock")


def cuda_of(pinned: Mapping[str, str]) -> str:
    """The CUDA that the pinned torch is built for; of the newest row of the table when it is not known."""
    rows = compatible_versions()
    return str(next((row for row in rows if row["torch"] == pinned.get("torch")), rows[0])["cuda"])
