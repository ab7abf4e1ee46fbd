"""What this machine or container has for a training, and what is wrong with it. Imports nothing heavy until it looks at it."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

from mlenv.errors import ConfigError, MlenvError, nearest

Severity = Literal["pass", "warn", "fail"]

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

_GIB: Final = 1 << 30
_SHARED_MEMORY: Final = 1 * _GIB
"""Below, Ray keeps its objects on the disk and NCCL may not start. A container gets 64 MiB unless it is told otherwise."""
_DISK_FAIL, _DISK_WARN = 1 * _GIB, 10 * _GIB
_TIMEOUT_SECONDS: Final = 10
_NOT_LOADED: Final = (ImportError, OSError, AttributeError, RuntimeError)
"""What the import of a package raises whose native library was built for another torch."""


@dataclass(frozen=True)
class Condition:
    """One thing that was looked at."""

    subject: str
    severity: Severity
    found: str
    fix: str = ""


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
    return [
        *package_conditions(questions.needed, questions.left_out),
        *(compatibility_conditions(installed_versions(), compatible_versions()) if _version("pyyaml") else ()),
        *import_conditions(),
        accelerator_condition(is_needed=GPU in questions.needed),
        cores_condition(),
        shared_memory_condition(),
        disk_condition("disk", questions.folder),
        disk_condition("temporary files", Path(tempfile.gettempdir())),
        mlflow_condition(mlflow),
        ray_condition(ray),
    ]


def is_fine(conditions: Iterable[Condition]) -> bool:
    """Whether nothing is wrong; a warning is not."""
    return all(condition.severity != "fail" for condition in conditions)


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
        except _NOT_LOADED as error:
            fix = "install the versions that go together, or the full lock with pip install --no-deps -r requirements/cpu.txt"
            yield Condition(f"import {name}", "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", fix)


def accelerator_condition(*, is_needed: bool = False) -> Condition:
    """GPUs that torch computes on."""
    driver = _driver()
    try:
        import torch
    except _NOT_LOADED:
        return judge_accelerator("", [], driver, is_needed=is_needed)
    names = []
    for place in range(torch.cuda.device_count()):
        name, memory = torch.cuda.get_device_name(place), torch.cuda.get_device_properties(place).total_memory
        try:
            ones = torch.ones(64, 64, device=f"cuda:{place}")
            assert float((ones @ ones).sum()) == 64**3
        except RuntimeError as error:
            fix = "install the build of torch for this GPU and this driver"
            return Condition("accelerator", "fail", f"{name} does not compute: {str(error).partition(chr(10))[0]}", fix)
        names.append(f"{name}, {memory / _GIB:.0f} GiB")
    return judge_accelerator(torch.version.cuda or "", names, driver, is_needed=is_needed)


def judge_accelerator(cuda: str, gpus: Sequence[str], driver: str, *, is_needed: bool) -> Condition:
    """
    Args:
        cuda: version that torch was built with; empty for a build for CPUs.
        gpus: those that compute.
        driver: version of NVIDIA's, empty when there is none.
    """
    if gpus:
        count = f"{len(gpus)} x " if len(gpus) > 1 else ""
        return Condition("accelerator", "pass", f"{count}{gpus[0]}; CUDA {cuda}, driver {driver or 'unknown'}")
    severity: Severity = "fail" if is_needed else "warn"
    if driver and cuda:
        found = f"none that torch can use, although there is a driver {driver}; torch is built for CUDA {cuda}"
        return Condition("accelerator", severity, found, "take a newer driver, or start the container with its GPUs (--gpus all)")
    if driver:
        return Condition("accelerator", severity, f"none used: a driver {driver}, but torch is built for CPUs", "install torch for CUDA")
    fix = "run where there is a GPU, or start the container with its GPUs (--gpus all)" if is_needed else ""
    return Condition("accelerator", "fail" if is_needed else "pass", "none; trainings compute on the CPU", fix)


def cores_condition() -> Condition:
    """Cores that this process may use, and a number of threads that was set by hand."""
    from mlenv.loops.thread_budget import available_cores

    return judge_cores(available_cores(), os.environ.get("OMP_NUM_THREADS", ""))


def judge_cores(cores: int, threads: str) -> Condition:
    """
    Args:
        threads: value of OMP_NUM_THREADS; empty when it is not set.
    """
    found = f"{cores}, OMP_NUM_THREADS={threads}" if threads else str(cores)
    if threads.isdecimal() and int(threads) > cores:
        return Condition(
            "cores", "warn", found, f"unset OMP_NUM_THREADS or set at most {cores}: threads that wait for a core hold up the step"
        )
    return Condition("cores", "pass", found)


def shared_memory_condition(folder: Path = Path("/dev/shm")) -> Condition:
    """Memory that processes of this machine share."""
    fix = "start the container with --shm-size=2g, or mount a volume in memory at /dev/shm"
    if not os.access(folder, os.W_OK):
        return Condition("shared memory", "warn", f"{folder} cannot be written", fix)
    usage = shutil.disk_usage(folder)
    found = f"{_size(usage.free)} free of {_size(usage.total)}"
    return Condition("shared memory", "warn", found, fix) if usage.free < _SHARED_MEMORY else Condition("shared memory", "pass", found)


def disk_condition(subject: str, folder: Path, *, fail: int = _DISK_FAIL, warn: int = _DISK_WARN) -> Condition:
    """Room in a folder, or where it would be made.

    Args:
        fail, warn: bytes free below which it is wrong, or to be looked at.
    """
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(there, os.W_OK):
        return Condition(subject, "warn", f"{there} cannot be written by user {os.getuid()}", "write to a folder of a mounted volume")
    usage = shutil.disk_usage(there)
    found = f"{_size(usage.free)} free of {_size(usage.total)} in {there}"
    severity: Severity = "fail" if usage.free < fail else "warn" if usage.free < warn else "pass"
    return Condition(subject, severity, found, "" if severity == "pass" else f"make room: checkpoints need it in {there}")


def mlflow_condition(uri: str) -> Condition:
    """Whether MLflow answers; nobody is asked when no place is named."""
    from mlenv.mlflow_outbox import without_password

    if not uri:
        return Condition("MLflow", "pass", "not named; trainings keep their runs in mlflow.db beside them")
    from mlenv.mlflow_store import asking, open_store

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
    there, here = version[1].decode(), _version("ray")
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
    except _NOT_LOADED as error:
        return Condition("Ray", "fail", f"{address} cannot be asked: {error}", "install mlenv[ray]")
    cpus = ray.cluster_resources().get("CPU", 0)
    ray.shutdown()
    return Condition("Ray", "pass", f"{address} answers, {cpus:.0f} CPUs")


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


def _driver() -> str:
    """The version of NVIDIA's driver, if this machine or container sees it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "of unknown version" if Path("/dev/nvidia0").exists() else ""
    version = re.search(r"Kernel Module\D*([\d.]+)", text)
    return version[1] if version else "of unknown version"


def _size(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / (1 << 20):.0f} MiB"
