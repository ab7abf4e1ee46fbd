"""The command line: a thin layer over what Python can do as well."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from mlenv.errors import (
    DONE,
    FAILED,
    GATE,
    STOPPED,
    WRONG_INPUT,
    ConfigError,
    GateError,
    MlenvError,
    StoppedError,
    TrainingError,
)
from mlenv.registry_commands import add_registry_commands

if TYPE_CHECKING:
    from mlenv.config import ExperimentConfig, WindowConfig
    from mlenv.feature_catalogue import CatalogueReader
    from mlenv.loops.evaluate import Evaluation


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 wrong usage, config or data, 3 a gate said no, 75 told to stop."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word]:
        parser.error(f"unknown arguments: {' '.join(unknown)}. Settings are given as key=value.")
    options.overrides = rest
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("mlenv").setLevel(logging.INFO)
    # Read by OpenMP when torch is loaded: compute threads that spin while they wait take the cores that decode the data.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path.insert(0, os.getcwd())  # a model repo's own classes are named by import path
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except TrainingError as error:
        print(f"mlenv: {error}", file=sys.stderr)
        return FAILED
    except GateError as error:
        print(f"mlenv: {error}", file=sys.stderr)
        return GATE
    except MlenvError as error:
        print(f"mlenv: {error}", file=sys.stderr)
        return WRONG_INPUT
    except OSError as error:  # a full or read-only disk, a server out of reach: nothing that a traceback would explain
        print(f"mlenv: {error}", file=sys.stderr)
        return FAILED
    except StoppedError as error:
        print(f"mlenv: stopped by {error}; the same command goes on", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("mlenv: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlenv", description="Trains, measures and tracks ranking models.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        group: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        made = group.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
        made.set_defaults(run=run)
        return made

    for name, run, text in (
        ("train", _train, "Train a model, or continue a killed training; measure it on the test window; write a report."),
        ("evaluate", _evaluate, "Measure the model that a training kept on the test window again, and write the report again."),
        ("predict", _predict, "Write the predictions of the model that a training kept for the test window."),
        ("validate", _validate, "Judge the data of a window, by itself and against an earlier one; exit code 3 when they fail."),
    ):
        made = verb(verbs, name, partial(_with_config, run if name == "validate" else partial(_in_processes, run)), text)
        made.add_argument("config", type=Path, help="YAML file; settings may follow as key=value")
        if name == "predict":
            made.add_argument("--out", type=Path, required=True, help="folder for the predictions")
        if name == "validate":
            made.add_argument("--window", choices=["train", "validation", "test"], help="what is judged; the test window if there is one")
            made.add_argument(
                "--baseline",
                default="",
                help="another window, a file of statistics, or the output folder of a training; the training window",
            )
            made.add_argument(
                "--backfilled",
                type=_days,
                metavar="START:END",
                help="days of the training window, or of --window, whose features were back-filled; judged against its other days",
            )
            made.add_argument("--out", type=Path, help="folder for validation.json, validation.html and statistics.json")

    made = verb(verbs, "tune", _tune, "Search for better values of a config's keys, in trials on Ray; go on with a search that was killed.")
    made.add_argument("tuning", type=Path, help="YAML file of the search; settings of it may follow as key=value")

    _add_compare(verbs, verb)
    data = verbs.add_parser(
        "data", help="Make, convert or look up data sets.", description="Make, convert or look up data sets."
    ).add_subparsers(required=True, metavar="VERB")
    made = verb(
        data, "simulate", _simulate, "Write an ads log of several days whose truth is known. Settings as key=value, such as num_days=7."
    )
    made.add_argument("--out", type=Path, required=True, help="new folder for the day partitions")
    made = verb(data, "convert", _convert, "Turn a public data set into Parquet files: by day, or into train, validation and test.")
    made.add_argument("dataset", choices=["frappe", "kuairand"])
    made.add_argument("--source", type=Path, required=True, help="folder of the original files")
    made.add_argument("--out", type=Path, required=True, help="new folder for the converted files")

    made = verb(
        data, "vocabulary", partial(_with_config, _vocabulary), "Print the vocabulary of a feature's table, from the training window."
    )
    made.add_argument("config", type=Path, help="YAML file; settings may follow as key=value")
    made.add_argument("feature", help="feature, or feature.field of a sequence")
    made.add_argument("--min-count", type=int, default=1, help="leave out ids that occur less often")

    made = verb(
        data, "backfill", _backfill, "Write the data set of a config with the columns of its joins added, so that no later run joins."
    )
    made.add_argument("config", type=Path, help="YAML file; settings may follow as key=value")
    made.add_argument("--out", type=Path, required=True, help="new folder for the data set")

    made = verb(data, "show", _show_dataset, "Tell what a run was trained on; exit code 3 when --verify finds other files now.")
    made.add_argument("name", metavar="RUN", help="output folder, MLflow run id, runs:/ID, models:/NAME@ALIAS or models:/NAME/VERSION")
    made.add_argument("--files", action="store_true", help="list the files with their hashes")
    made.add_argument("--uri", default="", help="where MLflow is, as in tracking.uri")
    beside = made.add_mutually_exclusive_group()
    beside.add_argument("--against", metavar="RUN", default="", help="another run; prints what it read otherwise")
    beside.add_argument("--verify", action="store_true", help="compare the record with the files as they are now")

    runs = verbs.add_parser("runs", help="Look after tracked runs.", description="Look after tracked runs.").add_subparsers(
        required=True, metavar="VERB"
    )
    made = verb(runs, "send", _send, "Send MLflow what it has not got of a training, because its server was away.")
    made.add_argument("output", type=Path, help="output folder of the training")

    _add_jobs(verbs, verb)
    _add_features(verbs, verb)
    add_registry_commands(verbs, verb)
    _add_serving(verbs, verb)
    made = verb(verbs, "ui", _ui, "Open MLflow on the runs tracked here.")
    made.add_argument("--uri", default="", help="where the runs are, as in tracking.uri; otherwise where training puts them by default")
    made.add_argument("--port", type=int, default=5000)
    return parser


def _add_jobs(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Trainings that a scheduler starts."""
    text = "Let Kubernetes, Slurm or a Ray cluster start a training."
    group = verbs.add_parser("job", help=text, description=text).add_subparsers(required=True, metavar="VERB")
    made = verb(group, "render", _render_job, "Write the job down, for kubectl apply or sbatch.")
    made.add_argument("config", type=Path, help="YAML file, as the job finds it; settings may follow as key=value")
    made.add_argument("--kind", choices=["rayjob", "pytorchjob", "slurm"], required=True)
    made.add_argument("--out", type=Path, required=True, help="file to write")
    made = verb(group, "submit", _submit_job, "Send this folder to a Ray cluster and start the training there.")
    made.add_argument("config", type=Path, help="YAML file in this folder; settings may follow as key=value")
    made.add_argument("--address", required=True, help="of the cluster's dashboard, such as http://HEAD:8265")
    made.add_argument("--follow", action="store_true", help="print what the job says until it ends; exit code 1 when it fails")


def _add_compare(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    text = "Say whether two models differ by more than their seeds do: train both with several seeds, or take finished runs."
    made = verb(verbs, "compare", _compare, text)
    for name in ("first", "second"):
        made.add_argument(
            name, help="YAML file, whose settings may follow as key=value; or a folder of finished runs, or a pattern of several"
        )
    made.add_argument("--out", type=Path, required=True, help="folder for the trainings, comparison.html and comparison.json")
    made.add_argument("--seeds", type=int, default=5, help="trainings of each config; more of them may be asked for later")
    made.add_argument("--metric", action="append", default=[], metavar="TASK/METRIC", help="may be given again; AUC, grouped AUC and NE")
    made.add_argument("--paired", action="store_true", help="compare trainings of the same seed with each other")
    made.add_argument("--max-concurrent", type=int, default=2, help="trainings under way at once")
    made.add_argument("--cpus", type=int, default=1, help="CPUs of a training")
    made.add_argument("--gpus", type=float, default=0, help="GPUs of a training")
    made.add_argument("--address", default="", help="Ray cluster to join, auto or host:port; otherwise one is started")


def _add_features(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """The catalogue of features, read from the runs that MLflow keeps."""
    from mlenv.schema import Entity

    text = "Know the features of all tracked runs: what they are, who uses them, how they have been."
    group = verbs.add_parser("features", help=text, description=text).add_subparsers(required=True, metavar="VERB")
    for name, run, text in (
        ("list", _features_list, "List the features of all runs, with coverage, drift and use."),
        ("show", _features_show, "Show one feature: its definition, its coverage and drift by day, its use."),
        ("usage", _features_usage, "Name the data sets, runs and registered model versions that use a feature."),
        ("alerts", _features_alerts, "Compare the coverage of what registered models use with their training; exit code 3 for a failure."),
        ("serve", _features_serve, "Show the catalogue as pages, to this machine alone."),
    ):
        made = verb(group, name, partial(_with_catalogue, run), text)
        if name in ("show", "usage"):
            made.add_argument("feature")
        if name == "list":
            made.add_argument("--entity", choices=get_args(Entity), default="", help="only features of it")
            made.add_argument("--owner", default="", help="only features of this owner")
            made.add_argument("--match", default="", metavar="TEXT", help="only features with this text in what the list says of them")
        if name == "alerts":
            made.add_argument("--all", action="store_true", help="all registered versions, also those without an alias")
            made.add_argument("--config", type=Path, help="measure the data of this config now, instead of what later runs recorded")
            made.add_argument("--window", choices=["train", "validation", "test"], help="of the config; the test window if there is one")
        if name == "serve":
            made.add_argument("--port", type=int, default=5001)
        made.add_argument("--uri", default="", help="where the runs are, as in tracking.uri; otherwise where training puts them by default")
        made.add_argument("--experiment", default="", help="only runs of this MLflow experiment")


def _add_serving(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """From a checkpoint to answers over HTTP."""
    text = (
        "Write a trained model as a package that is served without TorchRec, compared with the trainer; settings may follow as key=value."
    )
    made = verb(verbs, "export", _export, text)
    made.add_argument("model", help="output folder of a training, a checkpoint, or a model that MLflow keeps")
    made.add_argument("--out", type=Path, required=True, help="new folder for the package")
    made.add_argument("--format", default="onnx", metavar="NAMES", help="some of onnx, aoti, program, with commas between")
    made.add_argument("--tables", choices=["float32", "bfloat16", "int8"], default="float32", help="how embedding tables are stored")
    made.add_argument("--log-to-run", action="store_true", help="add the package to the training's run in MLflow")
    made.add_argument("--uri", default="", help="where MLflow is, for a model that it keeps")

    made = verb(verbs, "serve", _serve, "Answer HTTP requests with the predictions of a package: POST /predict, GET /schema, GET /health.")
    made.add_argument("package", type=Path, help="folder that mlenv export wrote")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines too")
    made.add_argument("--port", type=int, default=8080)
    made.add_argument("--format", choices=["onnx", "aoti", "program"], help="graph to run; onnx if the package has it")
    made.add_argument("--threads", type=int, default=1, help="threads of one request; 0 takes all cores")
    made.add_argument("--max-rows", type=int, default=1000, help="rows of one request")
    made.add_argument("--max-bytes", type=int, default=4 << 20, help="bytes of one request")
    made.add_argument("--log", type=Path, help="folder for the features served and the predictions, as Parquet files")


def _train(config: ExperimentConfig, options: argparse.Namespace) -> int:
    from mlenv.loops.ranks import is_main
    from mlenv.training import train

    result = train(config)
    if not is_main():
        return DONE
    print(f"trained {result.steps:,} steps -> {config.output}")
    if result.evaluation is not None:
        print(_table(result.evaluation, config.schema.tasks))
        print(f"report   {result.report}")
    if result.tracked_as:
        print(f"MLflow   {result.tracked_as} (mlenv ui)")
    return DONE


def _evaluate(config: ExperimentConfig, options: argparse.Namespace) -> int:
    from mlenv.experiment import Experiment
    from mlenv.loops.ranks import is_main
    from mlenv.training import REPORT, evaluate_and_report

    with Experiment(config) as experiment:
        checkpoint = experiment.load()
        evaluation = evaluate_and_report(experiment)
    if not is_main():
        return DONE
    print(f"measured {checkpoint}")
    print(_table(evaluation, config.schema.tasks))
    print(f"report   {Path(config.output) / REPORT}")
    return DONE


def _predict(config: ExperimentConfig, options: argparse.Namespace) -> int:
    from mlenv.experiment import Experiment
    from mlenv.loops.evaluate import predict
    from mlenv.loops.ranks import is_main

    with Experiment(config) as experiment:
        checkpoint = experiment.load()
        num_rows = predict(experiment.model, experiment.source("test"), options.out, experiment.calibrators)
    if is_main():
        print(f"{num_rows:,} rows scored with {checkpoint} -> {options.out}")
    return DONE


def _tune(options: argparse.Namespace) -> int:
    from mlenv.composition import to_yaml
    from mlenv.tuning import check_search, compose_tuning, tune

    if options.dry_run:
        config = compose_tuning(options.tuning, options.overrides)
        check_search(config)
        print(to_yaml(config), end="")
        return DONE
    result = tune(options.tuning, options.overrides)
    print(f"{len(result.trials)} trials, the best of them {result.best.number}: {result.best.best:.5f}")
    print("\n".join(f"  {key}: {value}" for key, value in result.best.values.items()))
    print(f"config   {result.config}")
    print(f"page     {result.page}")
    if result.tracked_as:
        print(f"MLflow   {result.tracked_as} (mlenv ui)")
    return DONE


def _compare(options: argparse.Namespace) -> int:
    from mlenv.comparison import check_comparison, compare
    from mlenv.config import ResourcesConfig

    wanted = {"out": options.out, "num_seeds": options.seeds, "metrics": options.metric}
    resources = ResourcesConfig(max_concurrent=options.max_concurrent, cpus=options.cpus, gpus=options.gpus, address=options.address)
    if options.dry_run:
        check_comparison(options.first, options.second, options.overrides, **wanted)
        print(f"would compare {options.first} and {options.second} in {options.out}")
        return DONE
    result = compare(options.first, options.second, options.overrides, **wanted, is_paired=options.paired, resources=resources)
    print("\n".join(result.sentences))
    print(f"page     {result.page}")
    if result.tracked_as:
        print(f"MLflow   {result.tracked_as} (mlenv ui)")
    return DONE


def _validate(config: ExperimentConfig, options: argparse.Namespace) -> int:
    from mlenv.validation_run import validate

    verdict = validate(config, window=options.window, baseline=options.baseline, backfilled=options.backfilled, out=options.out)
    for finding in verdict.raised:
        limit = "" if finding.limit is None else f" (limit {finding.limit:.4g})"
        print(f"{finding.severity.upper()}  {finding.check.ljust(21)}  {finding.subject}  {finding.value:.4g}{limit}")
        print(f"      {finding.detail} To do: {finding.fix}.")
    print(f"{verdict.severity}: {len(verdict.raised)} of {len(verdict.findings)} figures beyond their limits")
    if options.out is not None:
        print(f"page     {options.out / 'validation.html'}")
    return GATE if verdict.severity == "fail" else DONE


def _days(text: str) -> WindowConfig:
    """START:END, both ends included."""
    from mlenv.config import WindowConfig

    start, separator, end = text.partition(":")
    try:
        if start and end and separator:
            return WindowConfig(start=start, end=end)
    except MlenvError:
        pass
    raise argparse.ArgumentTypeError(f"expected START:END, two days as YYYY-MM-DD in order. Received: {text!r}")


def _vocabulary(config: ExperimentConfig, options: argparse.Namespace) -> int:
    from mlenv.composition import to_yaml
    from mlenv.datasets.parquet_source import ParquetSource
    from mlenv.datasets.vocabulary import build_vocabulary, table_columns

    _, columns = table_columns(config.schema, options.feature)
    source = ParquetSource(config.data, config.data.train, config.schema)
    found = build_vocabulary(source.record_batches(columns), config.schema, options.feature, options.min_count)
    print(f"# {len(found.ids):,} of {found.num_distinct:,} ids, {found.occurrence_share:.2%} of the occurrences; the others share one row.")
    table = {"ids": "vocabulary", "num_embeddings": len(found.ids) + 1, "out_of_range": "hash", "vocabulary": list(found.ids)}
    print(to_yaml({"schema": {"tables": {found.table: table}}}), end="")
    return DONE


def _simulate(options: argparse.Namespace) -> int:
    from mlenv.composition import from_plain, parse_overrides, to_yaml
    from mlenv.datasets.simulated_ads import SimulationConfig, simulate

    config = from_plain(parse_overrides(options.overrides), SimulationConfig, "simulation")
    if options.dry_run:
        print(to_yaml(config), end="")
        return DONE
    simulate(config, options.out)
    print(f"wrote {options.out}")
    return DONE


def _convert(options: argparse.Namespace) -> int:
    if options.dry_run:
        print(f"would convert {options.dataset} from {options.source} to {options.out}")
        return DONE
    from mlenv.datasets.frappe import convert_frappe
    from mlenv.datasets.kuairand import convert_kuairand

    convert = {"frappe": convert_frappe, "kuairand": convert_kuairand}[options.dataset]
    convert(options.source, options.out)
    print(f"wrote {options.out}")
    return DONE


def _backfill(options: argparse.Namespace) -> int:
    from mlenv.composition import compose
    from mlenv.datasets.backfill import backfill
    from mlenv.dry_run import check_data

    config = compose(options.config, options.overrides)
    if options.dry_run:
        check_data(config)
        print(f"would write {config.data.path} with the columns of its joins to {options.out}")
        return DONE
    num_rows = backfill(config.data, config.schema, options.out)
    print(f"wrote {num_rows:,} rows to {options.out}")
    return DONE


def _render_job(options: argparse.Namespace) -> int:
    from mlenv.composition import compose
    from mlenv.job_manifests import render
    from mlenv.page import write_whole

    config = compose(options.config, options.overrides)
    text = render(config, options.kind, ["train", str(options.config), *options.overrides])
    if options.dry_run:
        print(text, end="")
        return DONE
    write_whole(text, options.out)
    print(f"wrote {options.out}: {'sbatch' if options.kind == 'slurm' else 'kubectl apply -f'} {options.out}")
    return DONE


def _submit_job(options: argparse.Namespace) -> int:
    from mlenv.composition import compose
    from mlenv.job_submit import check_job, follow, submit

    config = compose(options.config, options.overrides)
    check_job(config)
    if options.dry_run:
        print(f"would send {os.getcwd()} to {options.address} and train {options.config} there")
        return DONE
    job = submit(config, ["train", str(options.config), *options.overrides], options.address)
    print(job, flush=True)
    return follow(job, options.address, partial(print, end="", flush=True)) if options.follow else DONE


def _send(options: argparse.Namespace) -> int:
    from mlenv.tracking import send_pending, tracked_run

    uri = tracked_run(options.output).uri
    if options.dry_run:
        print(f"would send what MLflow at {uri} has not got of {options.output}")
        return DONE
    send_pending(options.output)
    print(f"MLflow at {uri} has all of run {tracked_run(options.output).run_id}")
    return DONE


def _show_dataset(options: argparse.Namespace) -> int:
    if options.dry_run:
        print(f"would show what {options.name} was trained on" + (f", against {options.against}" if options.against else ""))
        return DONE
    from mlenv.dataset_record import changes_since, differences, summary
    from mlenv.dataset_show import find_record

    record = find_record(options.name, options.uri)
    if options.against:
        found = differences(record, find_record(options.against, options.uri))
        print("\n".join(found) if found else "both read the same")
        return DONE
    print(summary(record, with_files=options.files))
    if not options.verify:
        return DONE
    changes = changes_since(record)
    print("\n".join(changes) if changes else "the files are as they were")
    return GATE if changes else DONE


def _with_catalogue(run: Callable[[CatalogueReader, argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Finds the runs of a command; a dry run says where they are and goes no further."""
    from mlenv.feature_catalogue import CatalogueReader
    from mlenv.mlflow_outbox import without_password
    from mlenv.mlflow_store import store_uri

    uri = store_uri(options.uri)
    if options.dry_run:
        if getattr(options, "config", None):
            from mlenv.composition import compose
            from mlenv.dry_run import check_data

            check_data(compose(options.config, options.overrides))
        print(f"would read the runs of {without_password(uri)}")
        return DONE
    return run(CatalogueReader(uri, options.experiment), options)


def _features_list(reader: CatalogueReader, options: argparse.Namespace) -> int:
    from mlenv.feature_text import list_text

    catalogue = reader.read()
    print(list_text(catalogue, catalogue.matching(entity=options.entity, owner=options.owner, text=options.match)))
    return DONE


def _features_show(reader: CatalogueReader, options: argparse.Namespace) -> int:
    from mlenv.feature_text import show_text

    print(show_text(reader.read().feature(options.feature)))
    return DONE


def _features_usage(reader: CatalogueReader, options: argparse.Namespace) -> int:
    from mlenv.feature_text import usage_text

    print(usage_text(reader.read().feature(options.feature)))
    return DONE


def _features_alerts(reader: CatalogueReader, options: argparse.Namespace) -> int:
    from mlenv.composition import compose
    from mlenv.feature_alerts import find_alerts, measure
    from mlenv.feature_text import alerts_text

    if options.window and options.config is None:
        raise ConfigError("--window", expected="--config beside it, whose window it is", received=options.window)
    catalogue = reader.read()
    measured = measure(compose(options.config, options.overrides), options.window) if options.config else None
    alerts = find_alerts(catalogue, every_version=options.all, measured=measured)
    print(alerts_text(alerts))
    return GATE if alerts.has_failure else DONE


def _features_serve(reader: CatalogueReader, options: argparse.Namespace) -> int:
    from mlenv.feature_pages import serve

    reader.read()  # what is wrong is said here, not in the browser
    print(f"open http://127.0.0.1:{options.port}/", flush=True)
    serve(reader, options.port)
    return DONE


def _export(options: argparse.Namespace) -> int:
    from mlenv.serving.export import ExportOptions, check_export, export

    wanted = ExportOptions(
        out=options.out,
        formats=tuple(options.format.split(",")),
        tables=options.tables,
        tracking_uri=options.uri,
        overrides=tuple(options.overrides),
    )
    if options.dry_run:
        print(f"would export {check_export(options.model, wanted)} to {options.out}")
        return DONE
    package, parity = export(options.model, wanted)
    print(parity)
    print(f"package  {package.folder} (mlenv serve {package.folder})")
    if options.log_to_run:
        from mlenv.serving.mlflow_model import log_to_run

        print(f"MLflow   {log_to_run(package.folder, Path(options.model))}")
    return DONE


def _serve(options: argparse.Namespace) -> int:
    from mlenv.serving.package import open_package
    from mlenv.serving.predictor import Predictor
    from mlenv.serving.served_log import ServedLog
    from mlenv.serving.server import ServerOptions, serve

    wanted = ServerOptions(host=options.host, port=options.port, max_rows=options.max_rows, max_bytes=options.max_bytes)
    if options.dry_run:
        print(f"would serve {options.package} at http://{wanted.host}:{wanted.port}/predict")
        return DONE
    predictor = Predictor(open_package(options.package), options.format, options.threads)
    serve(predictor, wanted, ServedLog(options.log, predictor.tasks) if options.log else None)
    return DONE


def _ui(options: argparse.Namespace) -> int:
    from mlenv.mlflow_store import store_uri

    uri = store_uri(options.uri)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(options.port)]
    if uri.startswith(("http://", "https://")):
        print(f"the runs are at {uri}")
        return DONE
    if options.dry_run:
        print(" ".join(command))
        return DONE
    # MLflow's pages open on language-model traces unless the address asks for training runs.
    print(f"open http://127.0.0.1:{options.port}/#/experiments?workflowType=machine_learning", flush=True)
    os.execv(sys.executable, command)


def _with_config(run: Callable[[ExperimentConfig, argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Composes the config of a command; a dry run shows it and goes no further."""
    from mlenv.composition import compose

    config = compose(options.config, options.overrides)
    return _show(config) if options.dry_run else run(config, options)


def _in_processes(run: Callable[[ExperimentConfig, argparse.Namespace], int], config: ExperimentConfig, options: argparse.Namespace) -> int:
    """Runs the command here, or in the processes that the config asks for."""
    from mlenv.loops.ranks import started_by_launcher

    if not config.launch.starts_processes or started_by_launcher():
        return run(config, options)
    from mlenv.config import Command

    out = ["--out", str(options.out)] if "out" in options else []
    arguments = (options.verb, str(options.config), *out, *options.overrides)
    return config.launch.run(config, Command(arguments, lambda config: run(config, options)))


def _show(config: ExperimentConfig) -> int:
    from mlenv.composition import to_yaml
    from mlenv.dry_run import check_data, check_parts

    check_parts(config)
    check_data(config)
    print(to_yaml(config), end="")
    return DONE


def _table(evaluation: Evaluation, tasks: Sequence[str]) -> str:
    """The figures of each task, beside the best reachable where the data know the truth."""
    names = {"auc": "AUC", "normalized_entropy": "NE", "calibration": "calibration"}
    best = {"auc": "best AUC", "normalized_entropy": "best NE"} if evaluation.best else {}
    rows = [["task", *names.values(), *best.values()]]
    for task in tasks:
        figures = [evaluation.metrics.get(f"{task}/{name}") for name in names] + [evaluation.best.get(f"{task}/{name}") for name in best]
        rows.append([task, *("-" if figure is None else f"{figure:.4f}" for figure in figures)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
