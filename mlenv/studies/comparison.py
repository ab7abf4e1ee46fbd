"""Two models, several seeds of each: whether one is better than the other, or was only luckier."""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from mlenv.composition import compose, load, to_plain
from mlenv.config import CONFIG_FILE, MONITORS, ExperimentConfig, ResourcesConfig
from mlenv.dry_run import check_data, check_parts
from mlenv.errors import ConfigError, DataError, TrainingError
from mlenv.loops.journal import JOURNAL_FILE, Journal
from mlenv.pages.page import write_whole
from mlenv.records.dataset_record import DATASET_FILE, compare_files, read_dataset_record
from mlenv.records.tracking import MlflowTracker
from mlenv.studies.comparison_page import ComparisonPage, render_comparison
from mlenv.studies.seed_variance import CONFIDENCE, Difference, difference, sentence
from mlenv.studies.trials import Outcome, Trial, alone_in, check_one_process, cluster, remember, run_trials
from mlenv.training import METRICS

logger = logging.getLogger(__name__)

COMPARISON_FILE: Final = "comparison.json"
PAGE: Final = "comparison.html"

_MODELS_FILE: Final = "models.json"
_OUTCOME_FILE: Final = "trial.json"
_FOLDERS: Final = ("a", "b")
_DEFAULT_METRICS: Final = ("auc", "grouped_auc", "normalized_entropy")


@dataclass(frozen=True)
class ComparisonResult:
    """What two models differ in."""

    names: tuple[str, str]
    differences: tuple[Difference, ...]
    sentences: tuple[str, ...]
    """One for each difference."""
    page: Path
    tracked_as: str
    """The run in MLflow that those of the trainings are nested under; empty when nothing was trained, or is not tracked."""


@dataclass(frozen=True)
class _Model:
    """One of the two: a config that is trained with several seeds, or runs that are there."""

    name: str
    file: str
    config: ExperimentConfig | None
    runs: tuple[Path, ...]
    seeds: tuple[int, ...]
    """Of the runs, in their order."""


def compare(
    first: str,
    second: str,
    overrides: Sequence[str] = (),
    *,
    out: Path,
    num_seeds: int = 5,
    metrics: Sequence[str] = (),
    is_paired: bool = False,
    resources: ResourcesConfig | None = None,
) -> ComparisonResult:
    """Trains two configs with the same seeds, unless that is done, and compares what the test window says of them.

    Args:
        first, second: a config file each; or finished trainings: an output folder, a folder of several, or a pattern such as ``work/a-*``.
        overrides: ``key=value``, put over both configs.
        out: folder of the trainings and of the page.
        metrics: ``task/metric``; without any, AUC, grouped AUC and normalized entropy of every task.
        is_paired: whether to compare trainings of the same seed with each other. That is sharper where a seed moves both models alike;
            where it does not, it only halves the degrees of freedom.

    Raises:
        MlenvError: a config or a run cannot be used, before the first training.
        TrainingError: a training failed; the same command tries it again.
        StoppedError: a signal came; the same command goes on.
    """
    models = check_comparison(first, second, overrides, out=out, num_seeds=num_seeds, metrics=metrics)
    if is_paired and (len(set(models[0].seeds)) < len(models[0].seeds) or sorted(models[0].seeds) != sorted(models[1].seeds)):
        received = f"{list(models[0].seeds)} and {list(models[1].seeds)}"
        raise ConfigError("--paired", expected="the same seeds of both models, each once", received=received, fix="leave it out")
    with alone_in(out):
        configs = [model.config for model in models if model.config is not None]
        plain = {folder: to_plain(model.config) for folder, model in zip(_FOLDERS, models, strict=True)}
        remember(plain, out / _MODELS_FILE)
        tracker = _start_tracker(models, configs, out)
        try:
            _train_missing(models, overrides, out, resources or ResourcesConfig())
            result = _report(models, metrics, is_paired, out, tracker)
        except BaseException as error:
            if tracker is not None:
                tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        if tracker is None:
            return result
        tracker.finish("FINISHED")
        tracked = tracker.url or f"run {tracker.run_id or 'pending'} of experiment {configs[0].tracking.experiment!r}"
        return ComparisonResult(result.names, result.differences, result.sentences, result.page, tracked)


def check_comparison(
    first: str, second: str, overrides: Sequence[str], *, out: Path, num_seeds: int, metrics: Sequence[str]
) -> tuple[_Model, _Model]:
    """Finds the two models, and whether they can be compared."""
    if num_seeds < 2:
        raise ConfigError("--seeds", expected="at least 2", received=num_seeds)
    for metric in metrics:
        if metric.rpartition("/")[2] not in MONITORS or "/" not in metric:
            raise ConfigError("--metric", expected=f"TASK/METRIC with a metric of {sorted(MONITORS)}", received=metric)
    one, two = (_find(word, overrides, out / folder, num_seeds) for word, folder in zip((first, second), _FOLDERS, strict=True))
    if overrides and one.config is None and two.config is None:
        raise ConfigError(" ".join(overrides), expected="no settings for trainings that are finished", received=list(overrides))
    if one.config is not None and two.config is not None:
        windows = [(model.config.data.path, str(model.config.data.test)) for model in (one, two) if model.config is not None]
        if windows[0] != windows[1]:
            raise ConfigError(
                "data.test", expected="the same test window of the same data in both", received=" and ".join(map(str, windows))
            )
    if one.name == two.name:
        one, two = (_Model(model.file, model.file, model.config, model.runs, model.seeds) for model in (one, two))
    return one, two


def _find(word: str, overrides: Sequence[str], folder: Path, num_seeds: int) -> _Model:
    if not Path(word).is_dir() and word.endswith((".yaml", ".yml")):
        config = compose(word, overrides)
        check_one_process(config, word)
        if config.data.test is None:
            fix = "set data.test.start and end, or path"
            raise ConfigError(f"{word}: data.test", expected="a window, which the models are compared on", received=None, fix=fix)
        check_parts(config)
        check_data(config)
        seeds = range(config.seed, config.seed + num_seeds)
        return _Model(config.name, word, config, tuple(folder / f"seed-{seed}" for seed in seeds), tuple(seeds))
    found = [Path(path) for path in sorted(glob.glob(word))]
    runs = [run for path in found for run in ([path] if (path / METRICS).exists() else sorted(path.glob("*"))) if (run / METRICS).exists()]
    if len(runs) < 2:
        expected = f"a config file, or two or more output folders with {METRICS}"
        raise DataError(
            word, expected=expected, received=f"{len(runs)} of them", fix="train with more seeds, or name a folder of several runs"
        )
    seeds_there = [int(load(run / CONFIG_FILE).get("seed", 0)) for run in runs]
    return _Model(Path(word.rstrip("/*-_")).name or word, word, None, tuple(runs), tuple(seeds_there))


def _start_tracker(models: Sequence[_Model], configs: Sequence[ExperimentConfig], out: Path) -> MlflowTracker | None:
    if not configs or not configs[0].tracking.enabled:
        return None
    tracking = configs[0].tracking
    tracker = MlflowTracker(out, uri=tracking.uri, experiment=tracking.experiment, run_name=out.name)
    params = {f"model.{folder}": model.file for folder, model in zip(_FOLDERS, models, strict=True)}
    tracker.start(params | {"seeds": str(len(models[0].seeds))}, {"mlenv.kind": "comparison"})
    return tracker


def _train_missing(models: Sequence[_Model], overrides: Sequence[str], out: Path, resources: ResourcesConfig) -> None:
    missing = [trial for trial in _trials(models, overrides, out) if not _is_finished(trial)]
    if not missing:
        return
    failed: dict[str, str] = {}
    with cluster(resources) as ray, closing(run_trials(ray, iter(missing), resources)) as ended:
        for trial, outcome in ended:
            write_whole(json.dumps(asdict(outcome), indent=1), Path(trial.output) / _OUTCOME_FILE)
            logger.info("%s %s%s", trial.name, outcome.state, f": {outcome.error}" if outcome.error else "")
            if outcome.state == "failed":
                failed[trial.name] = outcome.error
    if failed:
        texts = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise TrainingError(f"{len(failed)} of {len(missing)} trainings failed. {texts} Fix: the same command tries them again.")


def _trials(models: Sequence[_Model], overrides: Sequence[str], out: Path) -> Iterator[Trial]:
    """Seed by seed, so that both models have about as many when one looks before the end."""
    trained = [model for model in models if model.config is not None]
    for place in range(max((len(model.seeds) for model in trained), default=0)):
        for model in trained:
            seed, folder = model.seeds[place], str(model.runs[place])
            name = f"{model.name}/seed-{seed}"
            own = (f"seed={seed}", f"name={json.dumps(name)}", f"output={json.dumps(folder)}")
            yield Trial(name=name, config=model.file, overrides=(*overrides, *own), output=folder, parent=str(out), measures_test=True)


def _is_finished(trial: Trial) -> bool:
    file = Path(trial.output) / _OUTCOME_FILE
    return file.exists() and Outcome(**json.loads(file.read_text())).state == "finished"


def _report(
    models: tuple[_Model, _Model], metrics: Sequence[str], is_paired: bool, out: Path, tracker: MlflowTracker | None
) -> ComparisonResult:
    _check_same_rows([run for model in models for run in model.runs])
    values = [[json.loads((run / METRICS).read_text()) for run in model.runs] for model in models]
    everywhere = [name for name in values[0][0] if all(run.get(name) is not None for side in values for run in side)]
    chosen = list(metrics) or [name for name in everywhere if name.rpartition("/")[2] in _DEFAULT_METRICS]
    if missing := [name for name in chosen if name not in everywhere] or ([] if chosen else ["any metric"]):
        raise DataError(
            missing[0], expected=f"a metric that {METRICS} of every run has", received="none", fix=f"take one of {everywhere[:20]}"
        )
    order = [sorted(range(len(model.seeds)), key=model.seeds.__getitem__) for model in models]
    confidence = 1 - (1 - CONFIDENCE) / len(chosen)
    found = tuple(
        difference(
            metric,
            [values[0][place][metric] for place in order[0]],
            [values[1][place][metric] for place in order[1]],
            is_paired=is_paired,
            confidence=confidence,
        )
        for metric in chosen
    )
    names = models[0].name, models[1].name
    sentences = tuple(sentence(one, *names, higher_is_better=MONITORS[one.metric.rpartition("/")[2]]) for one in found)
    seeds = tuple(tuple(sorted(model.seeds)) for model in models)
    write_whole(json.dumps(_plain(names, seeds, found, sentences), indent=1), out / COMPARISON_FILE)
    page = ComparisonPage(names, (models[0].file, models[1].file), (seeds[0], seeds[1]), found, sentences, CONFIDENCE)
    write_whole(render_comparison(page), out / PAGE)
    if tracker is not None:
        num_runs = sum(len(model.runs) for model in models)
        Journal(out / JOURNAL_FILE).append(num_runs, {f"difference/{one.metric}": one.mean for one in found})
        tracker.set_tags({f"found.{one.metric}": text for one, text in zip(found, sentences, strict=True)})
        for file in (COMPARISON_FILE, PAGE):
            tracker.log_artifact(out / file)
    return ComparisonResult(names, found, sentences, out / PAGE, "")


def _check_same_rows(runs: Sequence[Path]) -> None:
    """Raises DataError when two runs were not measured on the same files."""
    tests = {run: read_dataset_record(run / DATASET_FILE).windows.get("test") for run in runs}
    first = tests[runs[0]]
    for run, test in tests.items():
        if first is None or test is None or any(compare_files(first.files, test.files)):
            raise DataError(
                str(run / DATASET_FILE), expected=f"the test rows of {runs[0]}", received="others", fix="measure both on the same window"
            )


def _plain(names: Any, seeds: Any, found: Sequence[Difference], sentences: Sequence[str]) -> dict[str, Any]:
    rows = [
        asdict(one)
        | {"mean": one.mean, "low": one.interval[0], "high": one.interval[1], "is_real": one.is_real, "p_value": one.p_value}
        | {"visible": one.visible, "seeds_needed": one.seeds_needed, "sentence": text}
        for one, text in zip(found, sentences, strict=True)
    ]
    return {"models": names, "seeds": seeds, "confidence_of_all": CONFIDENCE, "differences": rows}
