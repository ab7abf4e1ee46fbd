"""The output folder of a training: for one training at a time, and for nothing that somebody else wrote."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from mlenv.composition import to_yaml
from mlenv.config import CONFIG_FILE, ExperimentConfig
from mlenv.errors import ConfigError, MlenvError
from mlenv.pages.page import write_whole

HEADER = "# What mlenv composed of defaults, files and overrides.\n"


def occupy(output: Path) -> IO[str]:
    """Makes the folder and keeps a second training out of it, until what is returned is closed.

    Raises:
        ConfigError: it is a file, or holds a config of somebody's own.
        MlenvError: another training is writing there.
    """
    written = output / CONFIG_FILE
    if (output.exists() and not output.is_dir()) or (written.exists() and not written.read_text().startswith(HEADER)):
        received = f"a file {CONFIG_FILE} of your own" if written.exists() else "a file"
        raise ConfigError("output", expected="a folder for the run alone", received=received, fix="set output to another folder")
    output.mkdir(exist_ok=True)
    lock = (output / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise MlenvError(f"{output}: another training is writing here. Fix: wait for it, or set output to another folder.") from error
    return lock


def write_config(config: ExperimentConfig) -> None:
    """Into the output folder, so that the next training knows the folder again."""
    write_whole(HEADER + to_yaml(config), Path(config.output) / CONFIG_FILE)
