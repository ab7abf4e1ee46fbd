"""The Frappe benchmark without its data: every config builds, and the verdict follows from the figures."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from mlenv.cli import main
from mlenv.errors import DONE

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"schema", "recipe", "shallow", "deep"}
"""What the models' configs extend."""
CONFIGS = sorted(path for path in (ROOT / "benchmarks" / "frappe").glob("*.yaml") if path.stem not in PARTS)


@pytest.fixture(scope="module")
def frappe():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)  # only here: with the root on the path, `datasets` would be ours for everyone
        yield importlib.import_module("benchmarks.frappe")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(config, frappe, capsys):
    assert config.stem in frappe.MODELS
    assert main(["train", str(config), "--dry-run"]) == DONE


def test_the_verdict_names_who_is_behind(frappe):
    def runs(**lower):
        """Two runs of every model, at its reference or below it by what is given."""
        free = {"transformer": frappe.Figures(0.985, 0.14), "together": frappe.Figures(0.9853, 0.14)}
        references = {**free, **frappe.PUBLISHED, **frappe.REMEASURED}
        aucs = {model: references[model].auc - lower.get(model, 0.0) for model in (*frappe.MODELS, "together")}
        return {model: [frappe.Figures(auc + change, 0.15) for change in (1e-4, -1e-4)] for model, auc in aucs.items()}

    result = frappe.compare(runs(deepfm=0.0004))
    assert result.reached
    assert "| DeepFM | 0.9841 ± 0.0001 | 0.9842 | 0.9845 | 0.1500 ± 0.0000 | 0.1482 | 0.1530 |" in result.table
    best = "Best mean: the deep models together, 0.9853 (target 0.9852); of a single model: transformer beside a DNN, 0.9850."
    assert f"none is behind by more. {best}" in result.verdict
    result = frappe.compare(runs(deepfm=0.0006, autoint=0.001, lr=0.1))
    assert not result.reached
    assert "behind by more: DeepFM (-0.0006), AutoInt+ (-0.0010). Best" in result.verdict
    assert not frappe.compare(runs(together=0.0002)).reached
