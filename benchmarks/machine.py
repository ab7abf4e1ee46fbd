"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version


def describe_machine() -> str:
    """Cores, processor, accelerator and versions in one line."""
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    versions = []
    for package in ("torch", "torchrec", "fbgemm-gpu-cpu", "lightning", "pyarrow"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    load = os.getloadavg()[0]
    hardware = f"{os.cpu_count()} cores ({_processor()}), {accelerator}"
    return f"{hardware}; Python {platform.python_version()}, {', '.join(versions)}; load when measured {load:.1f}."


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
