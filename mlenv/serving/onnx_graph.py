"""An exported program as an ONNX graph, with the operators that PyTorch's exporter does not know or knows in part."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from mlenv.errors import ConfigError, require

OPSET = 18


def write_onnx(program: torch.export.ExportedProgram, names: list[str], path: Path) -> None:
    """Writes the graph with its weights in one file, or beside it when they pass the 2 GB that such a file may have.

    Args:
        names: of the inputs.

    Raises:
        ConfigError: the model uses an operator that ONNX has not.
        MlenvError: the packages of the extra ``export`` are not there.
    """
    require("onnx", extra="export")
    require("onnxscript", extra="export")
    with without_chatter():
        try:
            made = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=["predictions"],
                custom_translation_table=_translations(),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise refused(error, "onnx") from error
        assert made is not None
        made.save(path)


def refused(error: Exception, form: str) -> ConfigError:
    """Says which part of a model stands in the way of an export, as far as the exporter tells."""
    innermost: BaseException = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    told = [line.strip() for text in (str(innermost), str(error)) for line in text.splitlines() if line.strip()]
    named = [line for line in told if "aten." in line or "aten::" in line or "torch.ops." in line or "Error when translating node" in line]
    fix = "write the model with other operators, without branches on the values of tensors"
    if form == "onnx":
        fix += ", or leave onnx out of --format"
    return ConfigError(
        "model", expected=f"a model that can be exported to {form}", received=" | ".join([told[0], *named[:1]])[:600], fix=fix
    )


@contextmanager
def without_chatter() -> Iterator[None]:
    """Keeps what PyTorch's compilers say of their own progress and deprecations from the user."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _translations() -> dict[Any, Any]:
    from onnxscript import opset18

    op: Any = opset18  # its types follow tensors through no expression: what an operator returns fits no other

    def rows_of_bags(lengths: Any, output_size: Any = None) -> Any:
        """repeat_interleave of a range: for each id the number of bags that end at or before it."""
        ends = op.CumSum(op.Cast(lengths, to=7), op.Constant(value_int=0))
        total = op.ReduceSum(op.Cast(lengths, to=7), keepdims=1)
        marks = op.Expand(op.Constant(value_ints=[0]), op.Add(total, op.Constant(value_ints=[1])))
        ones = op.Expand(op.Constant(value_ints=[1]), op.Shape(ends))
        ended = op.CumSum(op.ScatterElements(marks, ends, ones, axis=0, reduction="add"), op.Constant(value_int=0))
        return op.Slice(ended, op.Constant(value_ints=[0]), total)

    def repeat_interleave(values: Any, repeats: Any, dim: Any = None, output_size: Any = None) -> Any:
        return op.Gather(values, rows_of_bags(repeats), axis=dim or 0)

    def index_add(sums: Any, dim: int, index: Any, parts: Any, alpha: Any = 1) -> Any:
        """The exporter's own is ScatterND, which ONNX Runtime adds up in several threads at once and so now and then loses a part."""
        places = [place for place in range(len(parts.shape)) if place != dim % len(parts.shape)]
        columns = op.Expand(op.Unsqueeze(index, op.Constant(value_ints=places)), op.Shape(parts))
        if alpha != 1:
            parts = op.Mul(parts, op.CastLike(op.Constant(value_float=float(alpha)), parts))
        return op.ScatterElements(sums, columns, parts, axis=dim, reduction="add")

    def bucketize(values: Any, edges: Any, out_int32: bool = False, right: bool = False) -> Any:
        columns = op.Unsqueeze(values, op.Constant(value_ints=[-1]))
        below = op.GreaterOrEqual(columns, edges) if right else op.Greater(columns, edges)
        return op.ReduceSum(op.Cast(below, to=7), op.Constant(value_ints=[-1]), keepdims=0)

    return {
        torch.ops.aten.repeat_interleave.Tensor: rows_of_bags,
        torch.ops.aten.repeat_interleave.self_Tensor: repeat_interleave,
        torch.ops.aten.bucketize.Tensor: bucketize,
        torch.ops.aten.index_add.default: index_add,
    }
