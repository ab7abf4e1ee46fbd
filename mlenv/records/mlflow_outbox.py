"""What a run still has to tell MLflow: its journal, parameters, files and end."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import posixpath
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from mlenv.errors import DataError
from mlenv.loops.journal import JOURNAL_FILE, JournalFollower

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

T = TypeVar("T")

RECORD_FILE: Final = "tracking.json"

_KEY_TAG: Final = "mlenv.key"
_CONTEXT_TAG: Final = "mlflow.data.context"
_PARENT_TAG: Final = "mlflow.parentRunId"
_KEY_LENGTH: Final = 250
_PARAM_LENGTH: Final = 500  # what every MLflow server takes; the whole config is in the run as a file
_METRICS_PER_BATCH: Final = 1000
_PARAMS_PER_BATCH: Final = 100


@dataclass(frozen=True)
class Record:
    """``tracking.json``: the MLflow run of an output folder, and what is known of it besides the journal."""

    uri: str
    """Without a password, which has no place in an output folder."""
    experiment: str
    run_name: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """A tag of the run. It finds the run also when the answer to its creation was lost."""
    parent: str = ""
    """Output folder, seen from this one, of the run that this one is nested under; empty for none."""
    run_id: str = ""
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: tuple[tuple[str, str], ...] = ()
    """What is still to be sent: paths seen from the output folder, and folders in the run."""
    inputs: tuple[dict[str, str], ...] = ()
    """Data sets that are still to be sent: what MLflow's ``Dataset`` takes, and ``context``."""
    status: str = "RUNNING"
    start_ms: int = field(default_factory=lambda: now_ms())
    end_ms: int | None = None


class Outbox:
    """Brings an MLflow run up to what the output folder holds."""

    def __init__(self, output: Path, record: Record, uri: str) -> None:
        self.output = output.resolve()
        self.record = record
        self.url: str | None = None
        self._uri = uri
        self._lock = threading.Lock()
        self._client: MlflowClient | None = None
        self._status = ""
        self._journal = JournalFollower(self.output / JOURNAL_FILE)
        self._sent_steps: dict[str, int] = {}
        self._sent_tags: dict[str, str] = {}

    def change(self, change: Callable[[Record], Record]) -> None:
        """Replaces the record, in memory and on the disk; the training and the background thread both do."""
        with self._lock:
            self.record = change(self.record)
            temporary = self.output / f".{RECORD_FILE}.part"
            try:
                temporary.write_text(json.dumps(dataclasses.asdict(self.record), indent=1))
                temporary.replace(self.output / RECORD_FILE)
            except OSError as error:
                logger.warning("%s: cannot be written (%s). MLflow may miss a part of this run.", self.output / RECORD_FILE, error)

    def send(self) -> None:
        """Sends all that is new. After an error of any kind, call it again: it asks MLflow what has arrived and sends the rest."""
        try:
            client = self._client or self._connect()
            self._send_tags(client)
            self._send_metrics(client)
            self._send_status(client)
            self._send_inputs(client)
            self._send_artifacts(client)  # last, so that one that cannot be sent leaves nothing else open
        except Exception:
            self._client = None
            raise
        self._client = client

    def _connect(self) -> MlflowClient:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(tracking_uri=self._uri)
        nested = self._parent_tag()
        run = self._find_or_create_run(client, nested)
        self.change(lambda record: replace(record, run_id=run.info.run_id))
        if self._uri.startswith("http"):
            self.url = f"{self.record.uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        new_params = {_name(key): value[:_PARAM_LENGTH] for key, value in self.record.params.items() if _name(key) not in run.data.params}
        for params in _batches([Param(key, value) for key, value in new_params.items()], _PARAMS_PER_BATCH):
            client.log_batch(run.info.run_id, params=params)
        self._sent_tags = {}
        self._status = run.info.status
        self._sent_steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self._journal = JournalFollower(self.output / JOURNAL_FILE)
        return client

    def _parent_tag(self) -> dict[str, str]:
        """What nests the run under its parent, which must have arrived before."""
        if not self.record.parent:
            return {}
        folder = (self.output / self.record.parent).resolve()
        parent = load_record(folder)
        if parent is None or not parent.run_id:
            fix = f"mlenv runs send '{folder}', then this one"
            raise DataError(str(folder), expected="a run that MLflow has, because this one is a part of it", received="none", fix=fix)
        return {_PARENT_TAG: parent.run_id}

    def _find_or_create_run(self, client: MlflowClient, tags: dict[str, str]) -> Run:
        record = self.record
        experiment = client.get_experiment_by_name(record.experiment)
        if experiment is None:
            is_file = self._uri.startswith("sqlite:")
            artifacts = (_sqlite_path(self._uri).parent / "mlartifacts").as_uri() if is_file else None  # a server has its own place
            experiment_id = client.create_experiment(record.experiment, artifact_location=artifacts)
        else:
            experiment_id = experiment.experiment_id
        runs = client.search_runs([experiment_id], f"tags.`{_KEY_TAG}` = '{record.key}'", max_results=1)
        if runs:
            return runs[0]
        return client.create_run(experiment_id, start_time=record.start_ms, tags={_KEY_TAG: record.key} | tags, run_name=record.run_name)

    def _send_tags(self, client: MlflowClient) -> None:
        from mlflow.entities import RunTag

        tags = self.record.tags
        new = [RunTag(_name(key), value) for key, value in tags.items() if self._sent_tags.get(key) != value]
        for batch in _batches(new, _PARAMS_PER_BATCH):
            client.log_batch(self.record.run_id, tags=batch)
        self._sent_tags = tags

    def _send_metrics(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric

        while lines := self._journal.read():
            metrics = []
            for line in lines:
                step, time_ms = int(line.pop("step")), int(line.pop("time") * 1000)
                for key, value in line.items():
                    if step > self._sent_steps.get(_name(key), -1):
                        self._sent_steps[_name(key)] = step
                        metrics.append(Metric(_name(key), value, time_ms, step))
            for batch in _batches(metrics, _METRICS_PER_BATCH):
                client.log_batch(self.record.run_id, metrics=batch)

    def _send_status(self, client: MlflowClient) -> None:
        record = self.record
        if record.status == self._status:
            return
        if record.end_ms is None:
            client.update_run(record.run_id, status=record.status)
        else:
            client.set_terminated(record.run_id, record.status, record.end_ms)
        self._status = record.status

    def _send_inputs(self, client: MlflowClient) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = self.record.inputs
        if not inputs:
            return
        sent = client.get_run(self.record.run_id).inputs
        arrived = {(one.dataset.name, one.dataset.digest) for one in sent.dataset_inputs} if sent else set()
        new = [
            DatasetInput(Dataset(**{key: text for key, text in one.items() if key != "context"}), [InputTag(_CONTEXT_TAG, one["context"])])
            for one in inputs
            if (one["name"], one["digest"]) not in arrived
        ]
        if new:
            client.log_inputs(self.record.run_id, datasets=new)
        self.change(lambda record: replace(record, inputs=record.inputs[len(inputs) :]))

    def _send_artifacts(self, client: MlflowClient) -> None:
        while self.record.artifacts:
            place, folder = self.record.artifacts[0]
            path = self.output / place
            try:
                client.log_artifact(self.record.run_id, str(path), folder or None)
            except Exception:
                if path.exists():  # the others go first the next time
                    self.change(lambda record: replace(record, artifacts=record.artifacts[1:] + record.artifacts[:1]))
                    raise
                logger.warning("%s: no longer there, so MLflow does not get it.", path)
            self.change(lambda record: replace(record, artifacts=record.artifacts[1:]))


def load_record(output: Path) -> Record | None:
    path = output / RECORD_FILE
    try:
        entries = json.loads(path.read_text())
        artifacts = tuple((place, folder) for place, folder in entries["artifacts"])
        return Record(**entries | {"artifacts": artifacts, "inputs": tuple(entries.get("inputs", ()))})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            str(path), expected="what the tracker wrote", received=f"{type(error).__name__}: {error}", fix="remove the file"
        ) from error


def absolute_uri(uri: str) -> str:
    return f"sqlite:///{_sqlite_path(uri)}" if uri.startswith("sqlite:") else uri


def _sqlite_path(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///")).absolute()


def without_password(text: str) -> str:
    """A URI, or a sentence with URIs, as it may be shown and kept."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


def known_uri(place: str) -> str:
    """The URI of a place that was noted without its password: that of ``MLFLOW_TRACKING_URI``, where it is the same place."""
    uri = absolute_uri(os.environ.get("MLFLOW_TRACKING_URI", ""))
    return uri if without_password(uri) == place else place


def _name(key: str) -> str:
    """A key as MLflow allows it: ``ndcg@10`` becomes ``ndcg_10``."""
    return posixpath.normpath("/" + re.sub(r"[^\w./\- :]", "_", key)).strip("/")[:_KEY_LENGTH]


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def now_ms() -> int:
    return int(time.time() * 1000)
