"""What runs the numeric graph of a package."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlenv.datasets.encoded_rows import Floats
from mlenv.errors import ConfigError, require
from mlenv.schema import Schema
from mlenv.serving.inputs import GraphInputs, flat, input_names
from mlenv.serving.package import GRAPHS, Format, Package


class Runtime(Protocol):
    """Runs the graph; may be called from several threads."""

    def __call__(self, inputs: GraphInputs) -> Floats:
        """Predictions ``(rows, tasks)``, those of the padding rows included."""


def load_runtime(package: Package, form: Format | None = None, num_threads: int = 0) -> Runtime:
    """
    Args:
        form: of the graph; None takes ONNX, which needs no torch, if it is there.
        num_threads: of one request; 0 leaves it to the runtime.

    Raises:
        ConfigError: the package has no graph in this format.
        MlenvError: what runs it is not installed.
    """
    if not package.formats or (form is not None and form not in package.formats):
        fix = f"export the model again with --format {form or 'onnx'}"
        raise ConfigError("--format", expected=f"a format of the package, {list(package.formats)}", received=form, fix=fix)
    chosen = form or package.formats[0]
    path = package.folder / GRAPHS[chosen]
    if chosen == "onnx":
        return OnnxRuntime(path, package.schema, num_threads)
    return TorchRuntime(_load_aoti(path) if chosen == "aoti" else _load_program(path), num_threads)


class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    def __init__(self, path: Path, schema: Schema, num_threads: int) -> None:
        onnxruntime: Any = require("onnxruntime", extra="serve")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        # Threads that spin while they wait take the cores from the requests beside.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        wanted = {entry.name for entry in self._session.get_inputs()}
        self._names = [(place, name) for place, name in enumerate(input_names(schema)) if name in wanted]

    def __call__(self, inputs: GraphInputs) -> Floats:
        arrays = flat(inputs)
        (predictions,) = self._session.run(None, {name: arrays[place] for place, name in self._names})
        return np.asarray(predictions, np.float32)


class TorchRuntime:
    """A graph that PyTorch runs, one request at a time."""

    def __init__(self, graph: Any, num_threads: int) -> None:
        import torch

        if num_threads:
            torch.set_num_threads(num_threads)
        self._graph, self._lock = graph, threading.Lock()

    def __call__(self, inputs: GraphInputs) -> Floats:
        import torch

        ids, weights = ([torch.from_numpy(np.ascontiguousarray(one)) for one in part] for part in (inputs.ids, inputs.weights))
        with self._lock, torch.no_grad():
            predictions = self._graph(
                ids, torch.from_numpy(inputs.lengths), weights, torch.from_numpy(inputs.dense), torch.from_numpy(inputs.codes)
            )
        array: Floats = predictions.numpy()
        return array


def _load_aoti(path: Path) -> Any:
    import torch

    return torch._inductor.aoti_load_package(str(path))


def _load_program(path: Path) -> Any:
    import torch

    return torch.export.load(path).module()
