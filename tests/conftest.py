"""What every test runs under: one thread, no telemetry, nobody's tracking server, the same examples each time."""

from __future__ import annotations

import os

from hypothesis import settings

# Before torch, Arrow and Polars are imported: the test processes share the cores, and threads that wait for each other
# spin. Processes that a test starts inherit all of this.
os.environ.update(OMP_NUM_THREADS="1", POLARS_MAX_THREADS="1")
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", RAY_USAGE_STATS_ENABLED="0", MPLBACKEND="Agg")
os.environ.pop("MLFLOW_TRACKING_URI", None)

settings.register_profile("mlenv", derandomize=True, deadline=None, database=None)
settings.load_profile("mlenv")
