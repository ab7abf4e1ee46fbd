"""What this machine or container has for a training, and what is wrong with it. Imports nothing heavy until it looks at it."""

from __future__ import annotations

import importlib
import os
import platform
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from mlenv.condition import NOT_LOADED, Condition, Severity
from mlenv.errors import ConfigError, nearest
from mlenv.machine_conditions import accelerator_condition, cores_condition, disk_condition, shared_memory_condition
from mlenv.server_conditions import mlflow_condition, ray_condition

PACKAGES: Final = {
    "torch": ("torch",),
    "torchrec": ("torchrec",),
    "fbgemm": ("fbgemm-gpu", "fbgemm-gpu-cpu"),
    "lightning": ("lightning",),
    "ray": ("ray",),
    "mlflow": ("mlflow",),
}
"""Packages that are always shown, and the names under which each may be installed."""

GPU: Final = "gpu"
"""What ``Questions.needed`` calls an accelerator."""

TABLE: Final = Path(__file__).parent / "images" / "compatibility.yaml"


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What to look at beyond what every machine has."""

    mlflow: str = ""
    """Where MLflow is; MLFLOW_TRACKING_URI when empty, and when that is empty too nobody is asked."""
    ray: str = ""
    """A cluster: auto, host:port, or the http address of its dashboard; RAY_ADDRESS when empty."""
    folder: Path = Path()
    """Where trainings write."""
    needed: Collection[str] = ()
    """Names of PACKAGES that have to be there although mlenv runs without them, and ``gpu``."""
    left_out: Collection[str] = ()
    """Names of PACKAGES, or of others that mlenv asks for, that are left out on purpose, as in an image that only serves."""

    def __post_init__(self) -> None:
        wanted = set(_requirements()[0])
        for option, names, known in (("--need", self.needed, {*PACKAGES, GPU}), ("--without", self.left_out, {*PACKAGES} | wanted)):
            for name in names:
                if name not in known:
                    raise ConfigError(option, expected="a package of mlenv", received=name, fix=nearest(name, known))
        for name in sorted(set(self.needed) & set(self.left_out)):
            raise ConfigError("--without", expected="no package that --need names", received=name)


def examine(questions: Questions) -> list[Condition]:
    """Looks at everything; the order is that of the page."""
    mlflow = questions.mlflow or os.environ.get("MLFLOW_TRACKING_URI", "")
    ray = questions.ray or os.environ.get("RAY_ADDRESS", "")
    versions, rows = installed_versions(), compatible_versions() if _version("pyyaml") else []
    least_driver = next((str(row.get("driver", "")) for row in rows if row["torch"] == versions.get("torch")), "")
    return [
        *package_conditions(questions.needed, questions.left_out),
        *(compatibility_conditions(versions, rows) if rows else ()),
        *import_conditions(),
        accelerator_condition(is_needed=GPU in questions.needed, least_driver=least_driver),
        cores_condition(),
        shared_memory_condition(),
        disk_condition("disk", questions.folder),
        disk_condition("temporary files", Path(tempfile.gettempdir())),
        mlflow_condition(mlflow),
        ray_condition(ray),
    ]


def installed_versions() -> dict[str, str]:
    """Of those of PACKAGES that are there, without the part after ``+`` that says how torch was built."""
    found = {name: _version(*names) for name, names in PACKAGES.items()}
    return {name: version.partition("+")[0] for name, version in found.items() if version}


def compatible_versions(table: Path = TABLE) -> list[dict[str, Any]]:
    """The rows of the table of versions that go together."""
    import yaml

    rows: list[dict[str, Any]] = yaml.safe_load(table.read_text())
    return rows


def package_conditions(needed: Collection[str] = (), left_out: Collection[str] = ()) -> Iterator[Condition]:
    """Versions, held to what mlenv itself asks for."""
    version = _version("mlenv")
    yield Condition("mlenv", "pass", version) if version else Condition("mlenv", "warn", "not installed", "pip install mlenv")
    if not _version("packaging"):
        yield Condition("packaging", "fail", "not installed, so no versions are compared", "pip install packaging")
        return
    yield _python_condition()
    wanted, optional = _requirements()
    for name, names in PACKAGES.items():
        key = names[0]
        specifier = wanted.get(key, optional.get(key, ""))
        is_needed = name in needed or (key in wanted and name not in left_out)
        yield package_condition(name, _version(*names), specifier, is_needed=is_needed, install=_install(name, key in wanted))
    shown = {name for names in PACKAGES.values() for name in names}
    for name in sorted(set(wanted) - shown - set(left_out)):
        condition = package_condition(name, _version(name), wanted[name], is_needed=True, install=f"pip install '{name}{wanted[name]}'")
        if condition.severity != "pass":
            yield condition


def package_condition(name: str, version: str, specifier: str, *, is_needed: bool, install: str) -> Condition:
    """One package, held to the versions that are asked for.

    Args:
        version: empty when it is not installed.
        specifier: as in pyproject.toml, such as ``>=2.6``; empty takes any.
    """
    if not version:
        return Condition(name, "fail", "not installed", install) if is_needed else Condition(name, "pass", "not installed")
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(specifier).contains(version, prereleases=True):
        return Condition(name, "fail", f"{version}, but mlenv asks for {specifier}", install)
    return Condition(name, "pass", version)


def compatibility_conditions(versions: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> Iterator[Condition]:
    """Whether torch, torchrec and fbgemm are built for each other.

    Args:
        versions: by the names of PACKAGES.
        rows: see compatible_versions.
    """
    triple = {name: versions[name] for name in ("torch", "torchrec", "fbgemm") if name in versions}
    if "torch" not in triple:
        return
    received = " with ".join(f"{name} {version}" for name, version in triple.items())
    same_torch = [row for row in rows if row["torch"] == triple["torch"]]
    if not same_torch:
        known = ", ".join(str(row["torch"]) for row in rows)
        severity: Severity = "warn" if len(triple) == 1 else "fail"
        yield Condition("compatibility", severity, received, f"install torch {known}, for which mlenv is tested")
    elif not any(all(row[name] == version for name, version in triple.items()) for row in same_torch):
        row = same_torch[0]
        fix = f"install torchrec {row['torchrec']} and fbgemm {row['fbgemm']}, which are built for torch {row['torch']}"
        yield Condition("compatibility", "fail", received, fix)
    else:
        yield Condition("compatibility", "pass", f"{received} go together" if len(triple) > 1 else f"{received} is tested")


def import_conditions() -> Iterator[Condition]:
    """Packages with native libraries that are installed and do not load."""
    for name in ("torch", "torchrec"):
        if not _version(name):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                importlib.import_module(name)
        except NOT_LOADED as error:
            fix = "install the versions that go together, or the full lock with pip install --no-deps -r requirements/cpu.txt"
            yield Condition(f"import {name}", "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", fix)


def _python_condition() -> Condition:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    wanted = metadata.metadata("mlenv")["Requires-Python"] if _version("mlenv") else ""
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Condition("python", "pass", version)
    return Condition("python", "fail", f"{version}, but mlenv asks for {wanted}", "take a newer Python")


def _requirements() -> tuple[dict[str, str], dict[str, str]]:
    """Versions that mlenv asks for by package, of those that it cannot do without and of the others; none when it is not installed."""
    wanted: dict[str, str] = {}
    optional: dict[str, str] = {}
    if not (_version("mlenv") and _version("packaging")):
        return wanted, optional
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = metadata.requires("mlenv") or []
    for line in lines:
        requirement = Requirement(line)
        is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        (wanted if is_wanted else optional)[canonicalize_name(requirement.name)] = str(requirement.specifier)
    return wanted, optional


def _version(*names: str) -> str:
    """The version of the first of these that is installed, or nothing."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _install(name: str, is_wanted: bool) -> str:
    extra = "torchrec" if name == "fbgemm" else name
    return "pip install mlenv anew, or the packages of its lock" if is_wanted else f"pip install 'mlenv[{extra}]'"
