"""MLflow tracking that never stops a training.

The journal (``metrics.jsonl``) is the truth. A background thread follows it and tells MLflow; nothing in the training
waits for a server. What MLflow has received, MLflow itself is asked: every step of every metric arrives once, whoever
was killed in between. When the server is away, everything stays in the output folder and is sent when it answers again,
at the next start, or by ``send_pending``.
"""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Literal, final

from mlenv.errors import DataError, MlenvError
from mlenv.records.mlflow_outbox import RECORD_FILE, Outbox, Record, absolute_uri, known_uri, load_record, now_ms, without_password

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

DEFAULT_URI: Final = "sqlite:///mlflow.db"

_POLL_SECONDS: Final = 2.0
_LONGEST_WAIT_SECONDS: Final = 60.0
_PACKAGES: Final = ("mlenv", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "lightning", "mlflow", "pyarrow")
_ENVIRONMENT: Final = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the thread below tries again, without a warning each time
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",  # of Alembic too, which tells of every table of a new database
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@final
class MlflowTracker:
    """Sends a run's journal, parameters and files to MLflow from a background thread."""

    def __init__(self, output: Path, *, uri: str, experiment: str, run_name: str, parent: Path | None = None) -> None:
        """
        Args:
            output: the run's folder, which holds the journal. The MLflow run that was begun for it is continued.
            uri: where MLflow is; when empty, ``MLFLOW_TRACKING_URI``, then where this folder's run is, then ``mlflow.db`` here.
            parent: output folder of a tracked run that this one is nested under; it is sent after that one.
        """
        try:
            known = load_record(output)
        except DataError as error:
            logger.warning("%s A new MLflow run begins.", error)
            known = None
        uri = absolute_uri(uri or os.environ.get("MLFLOW_TRACKING_URI") or (known.uri if known else DEFAULT_URI))
        if known is None or (known.uri, known.experiment) != (without_password(uri), experiment):
            known = Record(uri=without_password(uri), experiment=experiment, run_name=run_name)
        known = replace(known, parent=os.path.relpath(parent.resolve(), output.resolve()) if parent is not None else "")
        self._outbox = Outbox(output, known, uri)
        self._finishing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def run_id(self) -> str | None:
        """MLflow's name of the run; None until it has given one."""
        return self._outbox.record.run_id or None

    @property
    def url(self) -> str | None:
        """Where a browser shows the run; None until it is known, and for a database file, which ``mlenv ui`` shows."""
        return self._outbox.url

    def start(self, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Begins to follow the journal. MLflow keeps the first value of a parameter; a tag takes the last."""
        prepare_environment()
        self._outbox.change(lambda record: replace(record, params=dict(params), tags=dict(tags), status="RUNNING", end_ms=None))
        self._thread = threading.Thread(target=self._follow, name="mlflow-tracker", daemon=True)
        self._thread.start()

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Adds a file, or a directory with all that is in it, to the run, in the folder of that name."""
        artifact = (os.path.relpath(path.resolve(), self._outbox.output), folder)
        self._outbox.change(lambda record: replace(record, artifacts=(*record.artifacts, artifact)))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Adds tags, or gives them other texts."""
        self._outbox.change(lambda record: replace(record, tags={**record.tags, **tags}))

    def log_inputs(self, inputs: Sequence[Mapping[str, str]]) -> None:
        """Adds data sets to what the run read; each has what MLflow's ``Dataset`` takes, and ``context``, such as train."""
        self._outbox.change(lambda record: replace(record, inputs=(*record.inputs, *map(dict, inputs))))

    def finish(self, status: Status, timeout_seconds: float = 30.0) -> None:
        """Sends the rest and closes the run. What MLflow does not take within the timeout stays for ``send_pending``."""
        if self._thread is None or self._finishing.is_set():
            return
        self._outbox.change(lambda record: replace(record, status=status, end_ms=now_ms()))
        self._finishing.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            logger.warning("MLflow at %s took too long. What is left is kept in %s.", self._outbox.record.uri, self._outbox.output)

    def _follow(self) -> None:
        place, output = self._outbox.record.uri, self._outbox.output
        wait_seconds, has_warned = _POLL_SECONDS, False
        while True:
            finishing = self._finishing.is_set()
            try:
                self._outbox.send()
            except Exception as error:  # noqa: BLE001 - whatever MLflow does, the training goes on
                is_repeated = wait_seconds > _POLL_SECONDS  # one failure alone is a server that was busy
                if not has_warned and (is_repeated or finishing):
                    logger.warning(
                        "MLflow at %s does not take this run (%s). It is kept in %s, to be sent later.", place, brief(error), output
                    )
                    has_warned = True
                wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)
            else:
                if has_warned:
                    logger.info("MLflow at %s takes this run again.", place)
                wait_seconds, has_warned = _POLL_SECONDS, False
            if finishing:
                return
            self._finishing.wait(wait_seconds)


def send_pending(output: Path) -> None:
    """Sends to MLflow what a run could not send while its server was away.

    Raises:
        DataError: the folder holds no tracked run.
        MlenvError: MLflow still does not take it.
    """
    record = tracked_run(output)
    prepare_environment()
    try:
        Outbox(output, record, known_uri(record.uri)).send()
    except Exception as error:
        raise MlenvError(f"MLflow at {record.uri}: {brief(error)}. Fix: start the server, then run this again.") from error


def tracked_run(output: Path) -> Record:
    """The MLflow run of an output folder.

    Raises:
        DataError: the folder holds no tracked run.
    """
    record = load_record(output)
    if record is None:
        fix = "name the output folder of a training with tracking.enabled"
        expected = f"the output folder of a tracked run, with {RECORD_FILE}"
        raise DataError(str(output), expected=expected, received="no such file", fix=fix)
    return record


def run_tags() -> dict[str, str]:
    """The git revision here, with ``-dirty`` when tracked files differ from it, and the versions of what computes."""
    tags = {"version.python": platform.python_version()}
    for package in _PACKAGES:
        try:
            tags[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return tags
    return tags if git.returncode else tags | {"git.revision": git.stdout.strip()}


def prepare_environment() -> None:
    """Makes MLflow's client fail soon and quietly; before it is imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def brief(error: Exception) -> str:
    """The first line of an error, without a password."""
    return without_password(str(error).partition("\n")[0] or type(error).__name__)[:300]
