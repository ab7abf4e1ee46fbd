"""What no section of a config can check by itself."""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Iterator
from dataclasses import replace

from mlenv.config.data import WORKERS, DataConfig
from mlenv.config.embeddings import EmbeddingsConfig, TableConfig
from mlenv.config.experiment import CALIBRATORS, ExperimentConfig
from mlenv.config.loop import MONITORS
from mlenv.config.objective import BALANCES, ObjectiveConfig
from mlenv.config.transforms import TRANSFORMS, LabelTransformConfig, TableTransformConfig, TransformConfig, WindowTransformConfig
from mlenv.errors import ConfigError, MlenvError, Problems, nearest
from mlenv.kinds import kind_of
from mlenv.schema import Schema


def check(config: ExperimentConfig) -> None:
    """Checks what crosses sections.

    Raises:
        Problems: names every problem at once.
    """
    problems = list(_problems(config))
    if problems:
        raise Problems("config", problems)


def _problems(config: ExperimentConfig) -> Iterator[MlenvError]:
    schema, data, loop = config.schema, config.data, config.loop
    yield from _objective_problems(config.objective, schema)
    for name, window in (("validation", data.validation), ("test", data.test)):
        if window is not None and window.overlaps(data.train):
            yield ConfigError(f"data.{name}", expected=f"days outside the training window ({data.train})", received=str(window))
    yield from _waiting_problems(data)
    yield from _transform_problems(config)
    uses = ["loop.evaluate_every_steps"] if loop.evaluate_every_steps else []
    uses += [f"calibration.{task}" for task, calibrator in config.calibration.items() if calibrator.needs_labels]
    if uses and data.validation is None:
        fix = "set data.validation.start and end, or path"
        yield ConfigError("data.validation", expected=f"a window, because of {', '.join(uses)}", received=None, fix=fix)
    if data.validation is not None and not uses:
        fix = "set loop.evaluate_every_steps or calibration, or take the window out"
        yield ConfigError("data.validation", expected="something that uses it", received=str(data.validation), fix=fix)
    for task, calibrator in config.calibration.items():
        if task not in schema.tasks:
            fix = nearest(task, schema.tasks)
            yield ConfigError(f"calibration.{task}", expected="a task of schema.labels", received=task, fix=fix)
        for column in set(calibrator.segments) - set(schema.segments):
            fix = f"add it to schema.segments; {nearest(column, schema.segments)}"
            yield ConfigError(f"calibration.{task}.segments", expected="columns of schema.segments", received=column, fix=fix)
    for feature in set(config.checks.may_drift) - set(schema.features):
        yield ConfigError("checks.may_drift", expected="features of the schema", received=feature, fix=nearest(feature, schema.features))
    for name in config.warm_start.renamed.keys() - schema.tables.keys() if config.warm_start else ():
        fix = nearest(name, schema.tables)
        yield ConfigError(f"warm_start.renamed.{name}", expected="a table of schema.tables", received=name, fix=fix)
    yield from _monitor_problems(config)
    yield from _table_optimizer_problems(config)
    yield from _accumulation_problems(config)
    yield from _compilation_problems(config)
    if config.embeddings.engine == "torchrec":
        for name, table in schema.tables.items():
            if table.embedding_dim % 4:
                fix = "round it up, or set embeddings.engine to torch"
                yield ConfigError(
                    f"schema.tables.{name}.embedding_dim", expected="a multiple of 4 for torchrec", received=table.embedding_dim, fix=fix
                )
        if not schema.tables:
            yield ConfigError("embeddings.engine", expected="torch, because the schema has no embedding table", received="torchrec")
    if not 0 <= config.seed < 2**63:
        yield ConfigError("seed", expected="an integer in [0, 2^63)", received=config.seed)
    if config.embeddings.engine == "torchrec" and importlib.util.find_spec("torchrec") is None:
        fix = "pip install 'mlenv[torchrec]', or embeddings.engine=torch"
        yield ConfigError("embeddings.engine", expected="an engine that is installed", received="torchrec", fix=fix)
    if kind_of(data.workers, WORKERS) == "ray" and importlib.util.find_spec("ray") is None:
        fix = "pip install 'mlenv[ray]', or data.workers.kind=threads"
        yield ConfigError("data.workers.kind", expected="workers that are installed", received="ray", fix=fix)


def _waiting_problems(data: DataConfig) -> Iterator[MlenvError]:
    """Windows whose labels were not known yet when the test window began."""
    if data.test is None or not data.label_wait_days:
        return
    for name, window in (("train", data.train), ("validation", data.validation)):
        if window is None or not window.end or window.overlaps(data.test):
            continue
        latest = datetime.date.max.toordinal()
        known = datetime.date.fromordinal(min(datetime.date.fromisoformat(window.end).toordinal() + data.label_wait_days, latest))
        if replace(window, end=known.isoformat()).overlaps(data.test):
            fix = "end it earlier, or let the test window begin later"
            expected = f"days before the test window ({data.test}) by more than label_wait_days, {data.label_wait_days}"
            yield ConfigError(f"data.{name}", expected=expected, received=str(window), fix=fix)


def _is_transform(value: object) -> bool:
    return isinstance(value, (TransformConfig, WindowTransformConfig, TableTransformConfig))


def _transform_problems(config: ExperimentConfig) -> Iterator[MlenvError]:
    """Samplers without a key, samplers that would draw the same, and sampling that is corrected twice."""
    drawn: dict[tuple[str, int], int] = {}
    for place, transform in enumerate(config.data.transforms):
        kind, key = kind_of(transform, TRANSFORMS), f"data.transforms[{place}]"
        if not _is_transform(transform):
            expected = "a class with the members of mlenv.config.TransformConfig, WindowTransformConfig or TableTransformConfig"
            yield ConfigError(f"{key}.kind", expected=expected, received=kind)
            continue
        if transform.sampling_seed is not None:
            if not config.schema.row_key:
                fix = "name the columns that identify a row"
                yield ConfigError("schema.row_key", expected=f"columns, because {key} samples by it", received=[], fix=fix)
            first = drawn.setdefault((kind, transform.sampling_seed), place)
            if first != place:
                expected = f"another seed than data.transforms[{first}], or both would keep the same rows"
                yield ConfigError(f"{key}.seed", expected=expected, received=transform.sampling_seed)
        if isinstance(transform, LabelTransformConfig):
            yield from _label_problems(config, transform, key)
        for task, calibrator in config.calibration.items():
            weight = config.schema.labels[task].weight if task in config.schema.labels else ""
            if kind == "sample_negatives" and weight in transform.writes and kind_of(calibrator, CALIBRATORS) == "negative_sampling":
                fix = f"take out calibration.{task}, or {key}.weight_column and schema.labels.{task}.weight"
                expected = f"another kind, because the weights of {key} correct the sampling already"
                yield ConfigError(f"calibration.{task}.kind", expected=expected, received="negative_sampling", fix=fix)


def _label_problems(config: ExperimentConfig, transform: LabelTransformConfig, key: str) -> Iterator[MlenvError]:
    """Labels of rows too young to have one, and labels that were not known yet when the test window began."""
    for task, label in config.schema.labels.items():
        mask = transform.masks.get(label.column or task)
        if mask and not label.mask:
            fix = f"set it to {mask}, or take out {key}.mask_column to leave out rows whose label is not known"
            yield ConfigError(f"schema.labels.{task}.mask", expected="a column, because the label may be null", received="", fix=fix)
    data, days = config.data, transform.days_until_known
    if data.test is not None and data.label_wait_days < days:
        fix = f"set it to {days}, and end the training window earlier"
        expected = f"at least {days}, because {key} knows a label only then"
        yield ConfigError("data.label_wait_days", expected=expected, received=data.label_wait_days, fix=fix)


def _table_optimizer_problems(config: ExperimentConfig) -> Iterator[MlenvError]:
    """Tables that are not there, and optimizers that TorchRec does not have."""
    embeddings, tables = config.embeddings, config.schema.tables
    for name in embeddings.tables.keys() - tables.keys():
        yield ConfigError(f"embeddings.tables.{name}", expected="a table of schema.tables", received=name, fix=nearest(name, tables))
    named: dict[str, EmbeddingsConfig | TableConfig] = {"embeddings": embeddings}
    named |= {f"embeddings.tables.{name}": table for name, table in embeddings.tables.items()}
    if embeddings.engine != "torchrec":
        for key in (key for key, options in named.items() if options.sharding):
            fix = "set embeddings.engine to torchrec"
            yield ConfigError(
                f"{key}.sharding", expected="null, because the engine torch copies tables", received=embeddings.engine, fix=fix
            )
        if embeddings.communication_precision != "fp32":
            key, expected = "embeddings.communication_precision", "fp32, because the engine torch sends no vectors"
            yield ConfigError(key, expected=expected, received=embeddings.communication_precision, fix="set embeddings.engine to torchrec")
        return
    for name in tables:
        own, key = embeddings.of(name), f"embeddings.tables.{name}.sharding"
        if own.optimizer == "row_wise_adagrad" and own.sharding == "column_wise":
            expected = "table_wise or row_wise, because row-wise Adagrad keeps one number per row, which parts of a row cannot share"
            yield ConfigError(key, expected=expected, received=own.sharding, fix="or give the table the optimizer sgd")
    fix = "set embeddings.engine to torch"
    for key, options in named.items():
        if options.optimizer == "adam":
            expected = "row_wise_adagrad or sgd, because TorchRec has no Adam on a CPU, and on a GPU one that skips rows without a gradient"
            yield ConfigError(f"{key}.optimizer", expected=expected, received="adam", fix=fix)
        if options.weight_decay:
            expected = "0, because fbgemm's fused update on a CPU leaves the decay out"
            yield ConfigError(f"{key}.weight_decay", expected=expected, received=options.weight_decay, fix=fix)


def _accumulation_problems(config: ExperimentConfig) -> Iterator[MlenvError]:
    """What would make several small batches another step than one large batch."""
    if config.loop.accumulate_batches == 1:
        return
    objective = config.objective
    reasons = {
        "embeddings.engine=torchrec updates its tables in every backward pass": config.embeddings.engine == "torchrec",
        "objective.balance weighs the tasks anew in every backward pass": objective.balance is not None,
        "objective.distillation is a mean over other weights than those of the labels": objective.distillation is not None,
        "a loss that compares the rows of a request is no mean over rows": objective.reads_requests,
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        fix = "raise data.batch_size instead"
        received = config.loop.accumulate_batches
        yield ConfigError("loop.accumulate_batches", expected=f"1, because {reason}", received=received, fix=fix)


def _compilation_problems(config: ExperimentConfig) -> Iterator[MlenvError]:
    """What a compiled part of the model cannot do."""
    mode, objective = config.loop.compile, config.objective
    watched = {
        "objective.distillation.hidden": objective.distillation is not None and objective.distillation.hidden is not None,
        "objective.balance": objective.balance is not None and kind_of(objective.balance, BALANCES) in ("grad_norm", "pcgrad"),
    }
    for key in (key for key, is_watching in watched.items() if is_watching and mode != "none"):
        expected = f"none, because {key} watches layers from outside, and a compiled model has none"
        yield ConfigError("loop.compile", expected=expected, received=mode)
    if mode != "none" and config.loop.strategy == "fsdp":
        yield ConfigError("loop.compile", expected="none with loop.strategy=fsdp, which gathers each part while it computes", received=mode)
    if mode == "cuda_graphs" and config.loop.accumulate_batches > 1:
        expected = "none or kernels with loop.accumulate_batches, because a graph writes each batch's gradients over those before"
        yield ConfigError("loop.compile", expected=expected, received=mode)


def _objective_problems(objective: ObjectiveConfig, schema: Schema) -> Iterator[MlenvError]:
    for section, tasks in (("losses", objective.losses), ("task_weights", objective.task_weights)):
        for task in tasks.keys() - set(schema.tasks):
            yield ConfigError(
                f"objective.{section}.{task}", expected="a task of schema.labels", received=task, fix=nearest(task, schema.tasks)
            )
    if objective.reads_requests and not schema.request:
        fix = "name the column in schema.request, or choose a loss that takes each row by itself"
        yield ConfigError("schema.request", expected="a column, because a loss compares the rows of a request", received="", fix=fix)
    if objective.reads_teacher_columns and not any(label.teacher for label in schema.labels.values()):
        fix = "name them, or name a checkpoint in objective.distillation.teacher"
        yield ConfigError("schema.labels", expected="a teacher column for at least one task", received="none", fix=fix)


def _monitor_problems(config: ExperimentConfig) -> Iterator[MlenvError]:
    """What keeps a training from choosing its best step."""
    loop, tasks = config.loop, config.schema.tasks
    if not loop.monitor:
        fix = f"set loop.monitor, for example to {tasks[0]}/auc" if tasks else "set loop.monitor"
        if loop.learning_rate_decay == "plateau":
            yield ConfigError(
                "loop.learning_rate_decay", expected="none, linear or cosine without loop.monitor", received="plateau", fix=fix
            )
        if loop.stop_after_evaluations:
            received = loop.stop_after_evaluations
            yield ConfigError("loop.stop_after_evaluations", expected="0 without loop.monitor", received=received, fix=fix)
        return
    task, _, metric = loop.monitor.partition("/")
    if task not in tasks:
        yield ConfigError(
            "loop.monitor", expected="TASK/METRIC with a task of schema.labels", received=loop.monitor, fix=nearest(task, tasks)
        )
    if metric not in MONITORS:
        expected = f"TASK/METRIC with one of {sorted(MONITORS)}"
        yield ConfigError(
            "loop.monitor", expected=expected, received=loop.monitor, fix=nearest(loop.monitor, [f"{task}/{name}" for name in MONITORS])
        )
    if metric == "grouped_auc" and not config.schema.request:
        fix = "name the column of the request in schema.request, or monitor auc"
        yield ConfigError("loop.monitor", expected="a metric that needs no schema.request", received=loop.monitor, fix=fix)
    if config.data.validation is None:
        fix = "set data.validation and loop.evaluate_every_steps"
        yield ConfigError("loop.monitor", expected="no monitor without data.validation", received=loop.monitor, fix=fix)
