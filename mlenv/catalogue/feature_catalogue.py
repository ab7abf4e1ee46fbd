"""The feature catalogue: what the runs that MLflow keeps have recorded of their features. It has no store of its own."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mlenv.catalogue.feature_record import FEATURES_FILE, FeatureDay, FeatureRecord
from mlenv.composition import from_plain, leaves, to_plain
from mlenv.config import CONFIG_FILE, ChecksConfig
from mlenv.errors import DataError, nearest
from mlenv.kinds import kind_of
from mlenv.models.registry import ModelVersion, list_versions
from mlenv.records.mlflow_outbox import absolute_uri, without_password
from mlenv.records.mlflow_store import asking, open_store, paged
from mlenv.schema import FEATURES, Feature, Schema
from mlenv.schema import Sequence as EventSequence

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

logger = logging.getLogger(__name__)

_PAGE = 500


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run says about its features."""

    run_id: str
    name: str
    started_ms: int
    data_sets: tuple[str, ...]
    """Paths of the config, as they are written there."""
    schema: Schema
    checks: ChecksConfig
    record: FeatureRecord | None
    """None of a run that was recorded before there was such a record, or did not get as far."""

    def __str__(self) -> str:
        return f"{self.name} ({self.run_id[:8]})"


@dataclass(frozen=True, kw_only=True)
class CataloguedFeature:
    """One feature over all runs, the newest first."""

    name: str
    runs: Sequence[Run]
    versions: Sequence[ModelVersion]
    """Registered model versions that were made from these runs."""

    @property
    def definition(self) -> Feature:
        """As the newest run has it."""
        return self.runs[0].schema.features[self.name]

    @property
    def kind(self) -> str:
        return kind_of(self.definition, FEATURES)

    @property
    def storage(self) -> str:
        """What its ids are; empty for numbers."""
        feature = self.definition
        if isinstance(feature, EventSequence):
            return ", ".join(dict.fromkeys(field.storage for field in feature.fields.values()))
        return str(getattr(feature, "storage", ""))

    @property
    def table(self) -> str:
        """Embedding tables that it is looked up in."""
        return ", ".join(sorted({key.table for key in self.runs[0].schema.sparse_keys if key.feature == self.name}))

    def _tables(self, run: Run) -> dict[str, Any]:
        tables = to_plain(run.schema.tables)
        return {key.table: tables[key.table] for key in run.schema.sparse_keys if key.feature == self.name}

    @property
    def data_sets(self) -> list[str]:
        return list(dict.fromkeys(path for run in self.runs for path in run.data_sets))

    @cached_property
    def days(self) -> dict[str, tuple[FeatureDay, Run]]:
        """By day, of the newest run that recorded it."""
        found: dict[str, tuple[FeatureDay, Run]] = {}
        for run in self.runs:
            if run.record is not None:
                for day, entry in run.record.features.get(self.name, {}).items():
                    found.setdefault(day, (entry, run))
        return dict(sorted(found.items()))

    @property
    def newest(self) -> tuple[str, FeatureDay] | None:
        """The newest day that was recorded."""
        return next(((day, entry) for day, (entry, _) in reversed(self.days.items())), None)

    @property
    def worst(self) -> tuple[str, FeatureDay] | None:
        """The day that differs most from the others, beyond what chance brings in so few rows; else the one that differs most."""
        drifting = [(day, entry) for day, (entry, _) in self.days.items() if entry.drift is not None]
        return max(drifting, key=lambda one: (is_drift(one[1]), one[1].drift or 0.0), default=None)

    @property
    def differences(self) -> list[str]:
        """Keys of the definition and of its tables that differ between runs, with their values and the runs that have them."""
        plain = [(run, leaves(to_plain(run.schema.features, FEATURES)[self.name] | {"tables": self._tables(run)})) for run in self.runs]
        lines = []
        for key in dict.fromkeys(key for _, entry in plain for key in entry):
            by_value: dict[str, list[str]] = {}
            for run, entry in plain:
                by_value.setdefault(repr(entry.get(key)), []).append(str(run))
            if len(by_value) > 1:
                lines.append(f"{key}: " + "; ".join(f"{value} in {_some(runs)}" for value, runs in by_value.items()))
        return lines


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """All that was found in a tracking store."""

    store: str
    runs: Sequence[Run]
    """The newest first."""
    versions: Sequence[ModelVersion]
    num_others: int = 0
    """Runs without the config of a training, which say nothing about features."""

    @cached_property
    def features(self) -> dict[str, CataloguedFeature]:
        """By name, in the order of the names."""
        runs: dict[str, list[Run]] = {}
        for run in self.runs:
            for name in run.schema.features:
                runs.setdefault(name, []).append(run)
        return {name: CataloguedFeature(name=name, runs=found, versions=self._versions(found)) for name, found in sorted(runs.items())}

    def feature(self, name: str) -> CataloguedFeature:
        """
        Raises:
            DataError: no run has it.
        """
        if name not in self.features:
            raise DataError(self.store, expected="a feature that a run was trained on", received=name, fix=nearest(name, self.features))
        return self.features[name]

    def matching(self, *, entity: str = "", owner: str = "", text: str = "") -> list[CataloguedFeature]:
        """Features of an entity and an owner, with a text in their name, owner, entity, kind or table, in whatever case."""
        return [
            one
            for one in self.features.values()
            if entity in ("", one.definition.entity)
            and owner in ("", one.definition.owner)
            and text.lower() in " ".join((one.name, one.definition.owner, one.definition.entity, one.kind, one.table)).lower()
        ]

    def _versions(self, runs: Sequence[Run]) -> list[ModelVersion]:
        found = {run.run_id for run in runs}
        return [version for version in self.versions if version.run_id in found]


class CatalogueReader:
    """Reads the catalogue; what a run that has ended recorded is read once."""

    def __init__(self, uri: str, experiment: str = "") -> None:
        """
        Args:
            uri: where MLflow is.
            experiment: one experiment of it; all when empty.

        Raises:
            DataError: the database file is not there; MLflow would make a new one.
        """
        self.store, self._experiment = without_password(uri), experiment
        self._uri = absolute_uri(uri)
        self._client = open_store(self._uri)
        self._known: dict[tuple[str, int], Run] = {}

    def read(self) -> Catalogue:
        """
        Raises:
            DataError: there is no such experiment.
            MlenvError: MLflow does not answer.
        """
        with asking(self._uri):
            entries = [self._run(self._client, run) for run in self._runs(self._client)]
            versions = sorted(list_versions(self._client), key=lambda version: (version.name, -int(version.version)))
        runs = sorted((run for run in entries if run is not None), key=lambda run: -run.started_ms)
        return Catalogue(store=self.store, runs=runs, versions=versions, num_others=len(entries) - len(runs))

    def _runs(self, client: MlflowClient) -> Iterator[MlflowRun]:
        names = {experiment.name: experiment.experiment_id for experiment in paged(client.search_experiments, max_results=_PAGE)}
        if self._experiment and self._experiment not in names:
            raise DataError(self.store, expected="an experiment", received=self._experiment, fix=nearest(self._experiment, names))
        chosen = [names[self._experiment]] if self._experiment else [*names.values()]
        return paged(client.search_runs, experiment_ids=chosen, max_results=_PAGE)

    def _run(self, client: MlflowClient, run: MlflowRun) -> Run | None:
        key = (run.info.run_id, run.info.end_time or 0)
        if key in self._known:
            return self._known[key]
        found = _read_run(client, run)
        if found is not None and found.record is not None and run.info.end_time:  # files may arrive after the end
            self._known[key] = found
        return found


def is_drift(day: FeatureDay) -> bool:
    """Whether a day differs from the others by more than chance."""
    return day.drift is not None and day.drift_by_chance is not None and day.drift > day.drift_by_chance


def _read_run(client: MlflowClient, run: MlflowRun) -> Run | None:
    run_id, name = run.info.run_id, run.info.run_name or run.info.run_id
    held = {file.path for file in client.list_artifacts(run_id)}
    if CONFIG_FILE not in held:
        return None
    with tempfile.TemporaryDirectory() as folder:
        wanted = [file for file in (CONFIG_FILE, FEATURES_FILE) if file in held]
        texts = {file: Path(client.download_artifacts(run_id, file, folder)).read_text(encoding="utf-8") for file in wanted}
    try:
        plain: Any = OmegaConf.to_container(OmegaConf.create(texts[CONFIG_FILE]))
        return Run(
            run_id=run_id,
            name=name,
            started_ms=run.info.start_time,
            data_sets=_data_sets(plain["data"]),
            schema=from_plain(plain["schema"], Schema, f"{name}, schema"),
            checks=from_plain(plain.get("checks", {}), ChecksConfig, f"{name}, checks"),
            record=FeatureRecord.from_json(texts[FEATURES_FILE]) if FEATURES_FILE in texts else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError, YAMLError, OmegaConfBaseException) as error:
        logger.warning("Run %s (%s) is passed over: it was recorded by another version of mlenv, or by hand: %s", name, run_id, error)
        return None


def _data_sets(data: Mapping[str, Any]) -> tuple[str, ...]:
    """The folder of the data, and that of each window that has one of its own."""
    places = [data, *(data.get(window) or {} for window in ("train", "validation", "test"))]
    return tuple(dict.fromkeys(place["path"] for place in places if place.get("path")))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
