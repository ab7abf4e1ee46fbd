"""Finds the record of what a run read: in its output folder, or in MLflow."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mlenv.errors import DataError
from mlenv.records.dataset_record import DATASET_FILE, DatasetRecord, read_dataset_record
from mlenv.records.mlflow_store import asking, open_store, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAMES: Final = "an output folder, an MLflow run id, runs:/ID, models:/NAME@ALIAS or models:/NAME/VERSION"
"""What ``find_record`` takes."""

_RUN: Final = re.compile(r"(?:runs:/)?([0-9a-f]{32})/?")
_MODEL: Final = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")
_OLDER: Final = "train again: only a training records what it reads, and one of an older version did not"


def find_record(name: str, uri: str = "") -> DatasetRecord:
    """
    Args:
        name: an output folder, or the run or model of MLflow.
        uri: where MLflow is; when empty, ``MLFLOW_TRACKING_URI``, then ``mlflow.db`` here.

    Raises:
        DataError: there is no such run, or it has no record.
        MlenvError: MLflow does not answer.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / DATASET_FILE).is_file():
            raise DataError(name, expected=f"the output folder of a training, with {DATASET_FILE}", received="no such file", fix=_OLDER)
        return read_dataset_record(folder / DATASET_FILE)
    run, model = _RUN.fullmatch(name), _MODEL.fullmatch(name)
    if run is None and model is None:
        raise DataError(name, expected=NAMES, received="nothing there", fix="mlenv ui shows the runs")
    return _download(name, store_uri(uri))


def _download(name: str, uri: str) -> DatasetRecord:
    client = open_store(uri)
    with asking(uri, name), tempfile.TemporaryDirectory() as folder:
        run_id = _run_id(client, name)
        if DATASET_FILE not in {file.path for file in client.list_artifacts(run_id)}:
            raise DataError(f"{name}, run {run_id}", expected=DATASET_FILE, received="no such file", fix=_OLDER)
        return read_dataset_record(Path(client.download_artifacts(run_id, DATASET_FILE, folder)))


def _run_id(client: MlflowClient, name: str) -> str:
    if run := _RUN.fullmatch(name):
        return str(client.get_run(run[1]).info.run_id)  # asked, so that an unknown one is told from one without a record
    model = _MODEL.fullmatch(name)
    assert model is not None
    title, alias, version = model.groups()
    found = client.get_model_version_by_alias(title, alias) if alias else client.get_model_version(title, version)
    if not found.run_id:
        raise DataError(name, expected="a model of a run", received="a model without a run", fix="register the model of a training")
    return str(found.run_id)
