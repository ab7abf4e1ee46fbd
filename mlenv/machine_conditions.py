"""What this machine or container has for a training: GPUs, cores, shared memory, disk."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mlenv.condition import NOT_LOADED, Condition, Severity

_GIB: Final = 1 << 30
_SHARED_MEMORY: Final = 1 * _GIB
"""Below, Ray keeps its objects on the disk and NCCL may not start. A container gets 64 MiB unless it is told otherwise."""
_DISK_FAIL, _DISK_WARN = 1 * _GIB, 10 * _GIB


def accelerator_condition(*, is_needed: bool = False, least_driver: str = "") -> Condition:
    """GPUs that torch computes on; see judge_accelerator."""
    driver = _driver()
    try:
        import torch
    except NOT_LOADED:
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
    return judge_accelerator(torch.version.cuda or "", names, driver, is_needed=is_needed, least_driver=least_driver)


def judge_accelerator(cuda: str, gpus: Sequence[str], driver: str, *, is_needed: bool, least_driver: str = "") -> Condition:
    """
    Args:
        cuda: version that torch was built with; empty for a build for CPUs.
        gpus: those that compute.
        driver: version of NVIDIA's, empty when there is none.
        least_driver: the oldest that runs this CUDA, where it is known.
    """
    if gpus:
        count = f"{len(gpus)} x " if len(gpus) > 1 else ""
        return Condition("accelerator", "pass", f"{count}{gpus[0]}; CUDA {cuda}, driver {driver or 'unknown'}")
    severity: Severity = "fail" if is_needed else "warn"
    if driver and cuda:
        found = f"none that torch can use, although there is a driver {driver}; torch is built for CUDA {cuda}"
        newer = f"driver {least_driver} or newer" if least_driver else "a newer driver"
        return Condition("accelerator", severity, found, f"take {newer}, or start the container with its GPUs (--gpus all)")
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
