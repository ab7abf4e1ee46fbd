"""Where MLflow keeps a run: ``tracking`` of a config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps the run."""

    enabled: bool = True
    """Without it the numbers stay in the output folder only."""
    uri: str = ""
    """Tracking server; MLFLOW_TRACKING_URI when empty, and without that a SQLite file in the current folder."""
    experiment: str = "mlenv"
    """MLflow experiment that the run belongs to."""
