"""The commands from a checkpoint to answers over HTTP: ``mlenv export`` and ``mlenv serve``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from mlenv.errors import DONE


def add_serving_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line; ``verb`` makes one."""
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


def _export(options: argparse.Namespace) -> int:
    from mlenv.records.mlflow_store import store_uri
    from mlenv.serving.export import ExportOptions, check_export, export

    wanted = ExportOptions(
        out=options.out,
        formats=tuple(options.format.split(",")),
        tables=options.tables,
        tracking_uri=store_uri(options.uri),
        overrides=tuple(options.overrides),
    )
    if options.dry_run:
        print(f"would export {check_export(options.model, wanted)} to {options.out}")
        return DONE
    if options.log_to_run:
        from mlenv.records.tracking import tracked_run

        tracked_run(Path(options.model))  # that there is one, before the long work
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
