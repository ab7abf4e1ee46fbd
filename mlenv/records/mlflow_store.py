"""MLflow, asked about what it keeps: where it is, a client that is sure not to make a new database, errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mlenv.errors import DataError, MlenvError
from mlenv.records.mlflow_outbox import absolute_uri, without_password
from mlenv.records.tracking import DEFAULT_URI, brief, prepare_environment

if TYPE_CHECKING:
    from mlflow import MlflowClient

_NOT_THERE: Final = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def store_uri(uri: str = "") -> str:
    """The place that is named; else ``MLFLOW_TRACKING_URI``, then ``mlflow.db`` here."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def open_store(uri: str) -> MlflowClient:
    """A client for the runs and the registered models of one place.

    Raises:
        DataError: the database file is not there; MLflow would make a new one.
        MlenvError: it cannot be opened.
    """
    uri = absolute_uri(uri)
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).is_file():
        fix = "train with tracking.enabled, or name the place of the runs with --uri or MLFLOW_TRACKING_URI"
        raise DataError(without_password(uri), expected="a database of tracked runs", received="no such file", fix=fix)
    prepare_environment()
    from mlflow import MlflowClient

    with asking(uri):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def asking(uri: str, name: str = "", *, what: str = "a run or a model", fix: str = "mlenv ui shows them") -> Iterator[None]:
    """Turns what MLflow's client raises into an error that says where and what to do.

    Args:
        name: what is asked for. One that MLflow does not have is a DataError of it; all else is a failure of MLflow.
    """
    place = without_password(uri)
    try:
        yield
    except MlenvError:
        raise
    except Exception as error:
        if name and getattr(error, "error_code", "") in _NOT_THERE:
            raise DataError(name, expected=f"{what} of MLflow at {place}", received=brief(error), fix=fix) from error
        raise MlenvError(f"MLflow at {place}: {brief(error)}. Fix: start the server, or set --uri.") from error


def paged(search: Any, **options: Any) -> Iterator[Any]:
    """All that a search of MLflow's client finds, page by page."""
    token: str | None = None
    while True:
        page = search(page_token=token, **options)
        yield from page
        token = page.token
        if not token:
            return
