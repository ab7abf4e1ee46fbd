"""A package as a model that MLflow serves: the folder itself is one, read by the loader below, with no code of a team's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mlenv.errors import DataError, MlenvError
from mlenv.schema import Schema
from mlenv.serving.columns import from_rows
from mlenv.serving.package import open_package
from mlenv.serving.predictor import Predictor

ARTIFACT = "package"
"""Folder of a run that holds the package."""


def write_mlflow_model(folder: Path, schema: Schema, columns: pa.Schema) -> None:
    """Writes MLmodel, with the signature, and the requirements that MLflow wants beside it."""
    from importlib.metadata import version

    from mlenv.records.tracking import prepare_environment

    prepare_environment()
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec
    from mlflow.types.schema import DataType as Type
    from mlflow.types.schema import Schema as Signature

    inputs = Signature([ColSpec(_mlflow_type(field.type), field.name) for field in columns])
    outputs = Signature([ColSpec(Type.double, task) for task in schema.tasks])
    model = Model(signature=ModelSignature(inputs, outputs))
    requirements = [f"{name}=={version(name)}" for name in ("mlflow", "numpy", "pyarrow", "xxhash", "omegaconf")]
    (folder / "requirements.txt").write_text("\n".join(["mlenv[serve]", *requirements]) + "\n", encoding="utf-8")
    pyfunc.add_to_model(model, loader_module=__name__, data=".")
    model.save(str(folder / "MLmodel"))


def log_to_run(package: Path, output: Path) -> str:
    """Adds a package to the MLflow run of a training; returns the model's address there, for ``mlflow models serve``.

    Raises:
        DataError: the training is not tracked, or MLflow has not got its run.
        MlenvError: MLflow does not answer.
    """
    from mlenv.records.mlflow_outbox import known_uri
    from mlenv.records.mlflow_store import asking, open_store
    from mlenv.records.tracking import tracked_run

    record = tracked_run(output)
    fix = f"mlenv runs send {output}, then run this again"
    if not record.run_id:
        raise DataError(str(output), expected="a training whose run MLflow has", received="a run that is still to be sent", fix=fix)
    uri = known_uri(record.uri)
    client = open_store(uri)
    with asking(uri, f"run {record.run_id}", what="the run of this training", fix=fix):
        client.log_artifacts(record.run_id, str(package), ARTIFACT)
    return f"runs:/{record.run_id}/{ARTIFACT}"


def _mlflow_type(kind: pa.DataType) -> Any:
    from mlflow.types.schema import AnyType, Array, DataType, Map, Object, Property

    if pa.types.is_map(kind):
        return Map(_mlflow_type(kind.item_type)) if pa.types.is_string(kind.key_type) else AnyType()  # type: ignore[no-untyped-call]
    if pa.types.is_struct(kind):
        return Object([Property(field.name, _mlflow_type(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return Array(_mlflow_type(kind.value_type))
    if pa.types.is_boolean(kind):
        return DataType.boolean
    if pa.types.is_integer(kind):
        return DataType.long
    return DataType.double if pa.types.is_floating(kind) else DataType.string


def _load_pyfunc(path: str) -> MlflowModel:
    """What MLflow calls."""
    return MlflowModel(Predictor(open_package(Path(path))))


class MlflowModel:
    """A package behind MLflow's interface."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """A pandas frame of rows to one of predictions, a column per task."""
        import pandas as pd
        from mlflow.exceptions import MlflowException

        rows = [{str(name): _plain(value) for name, value in row.items()} for row in model_input.to_dict("records")]
        try:
            predictions = self._predictor.predict(from_rows(rows, self._predictor.package.columns))
        except MlenvError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return pd.DataFrame(predictions.astype(np.float64), columns=list(self._predictor.tasks))


def _plain(value: Any) -> Any:
    """What pandas made of a value of JSON, as that value again."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and value != value else value
