"""A check as a run of MLflow, so that the figures of many days make a curve."""

from __future__ import annotations

from mlenv.monitoring.check import Checked
from mlenv.monitoring.server import STATES
from mlenv.records.mlflow_store import asking, open_store, store_uri


def track(checked: Checked, experiment: str, uri: str = "") -> str:
    """Adds a run with a metric ``CHECK/SUBJECT`` for each finding, and returns its id.

    Raises:
        MlenvError: MLflow cannot be reached.
    """
    place = store_uri(uri)
    client = open_store(place)
    moment = int(1000 * checked.at.timestamp())
    with asking(place):
        found = client.get_experiment_by_name(experiment)
        number = client.create_experiment(experiment) if found is None else found.experiment_id
        tags = {"mlflow.runName": f"{checked.facts['model']} {checked.at:%Y-%m-%d %H:%M}", "verdict": checked.verdict.severity}
        run: str = client.create_run(number, start_time=moment, tags={**tags, **checked.facts}).info.run_id
        figures = {f"{one.check}/{_name(one.subject)}": one.value for one in checked.verdict.findings}
        figures |= {f"mean_prediction/{task}": counts.mean for task, counts in checked.now.scores.items()}
        for name, value in {**figures, "verdict": STATES[checked.verdict.severity]}.items():
            client.log_metric(run, name, value, moment)
        client.set_terminated(run)
    return run


def _name(subject: str) -> str:
    """In the letters that MLflow takes."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in subject)
