"""Models as they are served: exported, held against themselves as they were trained, timed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from mlenv.datasets.parquet_source import ParquetSource
from mlenv.errors import ConfigError, GateError
from mlenv.inference.stored_scorer import HeldOut, StoredScorer
from mlenv.models.gates import Cost, Judgement
from mlenv.models.paired_scoring import fastest_in_turns
from mlenv.models.registry import ModelVersion
from mlenv.serving.export import ExportOptions, export
from mlenv.serving.package import Format, Package
from mlenv.serving.parity import TOLERANCE, requests
from mlenv.serving.predictor import Predictor
from mlenv.serving.row_transforms import keeping, plan_serving

_REQUEST_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class ExportedCosts:
    """What came of exporting models."""

    judgements: Sequence[Judgement]
    """That the first one can be exported, and says the same then."""
    costs: Sequence[Cost] | None
    """In the order of the models; None when one of them could not be exported."""


def measure_exported(
    versions: Sequence[ModelVersion], scorers: Sequence[StoredScorer], uri: str, rows: HeldOut, form: Format
) -> ExportedCosts:
    """Exports models of a registry to a folder that does not stay.

    Args:
        versions, scorers: the challenger first; a champion that cannot be exported is not held against it.
        uri: of the registry.

    Raises:
        MlenvError: what the format needs is not installed, or the rows cannot be read.
    """
    judgements, calls, sizes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for place, (version, scorer) in enumerate(zip(versions, scorers, strict=True)):
            options = ExportOptions(out=Path(folder, f"{place}"), formats=(form,), tracking_uri=uri)
            is_passed = True
            try:
                package, parity = export(f"models:/{version.name}/{version.version}", options, rows)
            except (ConfigError, GateError) as error:
                is_passed, detail = place > 0, str(error)
            else:
                detail = f"largest difference {parity.differences[form]:.2e} on {parity.rows:,} rows, may be {TOLERANCE:g}"
                predictor = Predictor(package, form)
                calls.append(partial(predictor.predict, _request(scorer, rows, package)))
                sizes.append(parity.bytes[form])
            judgements.append(Judgement(gate="export", subject=f"{version} to {form}", is_passed=is_passed, detail=detail))
        costs = None
        if len(calls) == len(versions):
            seconds = fastest_in_turns(calls)
            costs = [
                Cost(milliseconds=1e6 * best / call.args[0].num_rows, bytes=size, form=f"exported to {form}")
                for best, call, size in zip(seconds, calls, sizes, strict=True)
            ]
    return ExportedCosts(judgements=judgements, costs=costs)


def _request(scorer: StoredScorer, rows: HeldOut, package: Package) -> pa.RecordBatch:
    """Some of the rows, raw."""
    wanted = (*package.schema.feature_columns, *(column for of_task in package.segments.values() for column in of_task))
    data = replace(scorer.sections.data, path=rows.path, allow_missing_days=True)
    data = keeping(data, plan_serving(data.transforms, tuple(dict.fromkeys(wanted))))
    with closing(ParquetSource(data, rows.window, scorer.schema)) as source:
        return next(part for part in requests(package, source) if part.num_rows).slice(0, _REQUEST_ROWS)
