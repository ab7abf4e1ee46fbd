"""What the tests run in several processes."""

from __future__ import annotations

import logging
import logging.handlers
import math
import os
import runpy
import signal
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def train_each(cases: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Trains one config after the other; says which error ended each, or nothing."""
    from mlenv import compose, train

    _be_quiet()
    said = {}
    for name, settings in cases.items():
        try:
            train(compose(ROOT / "examples/demo/ranker.yaml", settings))
            said[name] = ""
        except Exception as error:  # noqa: BLE001 - the test looks at it
            said[name] = f"{type(error).__name__}: {error}"
    return said


def evaluate_each(cases: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """Metrics of the checkpoint in the output folder of each config."""
    from mlenv import Experiment, compose, evaluate

    _be_quiet()
    metrics = {}
    for name, settings in cases.items():
        with Experiment(compose(ROOT / "examples/demo/ranker.yaml", settings)) as experiment:
            experiment.load()
            metrics[name] = evaluate(experiment.model, experiment.source("test")).metrics
    return metrics


def train_in_ways(folder: Path, ways: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """The losses and positions that this rank saw of a training in several ways, each in the folder of its name."""
    from mlenv import Experiment, compose, fit
    from mlenv.loops.journal import Journal

    _be_quiet()
    found = {}
    for way, settings in ways.items():
        config = compose(ROOT / "examples/demo/ranker.yaml", [*settings, f"output={folder / way}"])
        with Experiment(config) as experiment:
            advance, positions = experiment.step.advance, []

            def noted(batches, progress, advance=advance, positions=positions):
                output = advance(batches, progress)
                if output is not None:
                    positions.append([output.position.row, output.num_examples])
                return output

            experiment.step.advance = noted
            progress = fit(experiment.step, experiment.source("train"), experiment.run, config.loop)
            own_rows = experiment.source("train").num_own_rows
        lines = Journal(folder / way / "metrics.jsonl").read()
        losses = [line["train/click/loss"] for line in lines if "train/click/loss" in line]
        found[way] = {"steps": progress.step, "own_rows": own_rows, "positions": positions, "losses": losses}
    return found


def skip_and_stop(settings: Sequence[str]) -> dict[str, Any]:
    """A training of which rank 1 has a bad loss in the third step, and is asked to end in the sixth."""
    from mlenv import Experiment, compose, fit
    from mlenv.errors import StoppedError
    from mlenv.loops.ranks import rank

    _be_quiet()
    config = compose(ROOT / "examples/demo/ranker.yaml", settings)
    with Experiment(config) as experiment:
        step = experiment.step
        advance, weights, seen = step.advance, [], []

        def advance_and_look(batches, progress):
            if rank() == 1 and progress.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            hook = experiment.model.register_forward_hook(lambda *told: told[-1] * math.nan) if rank() == 1 and progress.step == 2 else None
            output = advance(batches, progress)
            if hook is not None:
                hook.remove()
            weights.append(torch.cat([parameter.detach().flatten() for parameter in experiment.model.parameters()]))
            seen.append((output.num_examples, output.is_skipped))
            return output

        step.advance = advance_and_look
        said = ""
        try:
            fit(step, experiment.source("train"), experiment.run, config.loop)
        except StoppedError as error:
            said = str(error)
    stays = [bool(torch.equal(*pair)) for pair in pairwise(weights)]
    return {"seen": seen, "stays": stays, "said": said, "sum": float(weights[-1].double().sum())}


def train_on_few_rows(settings: Sequence[str]) -> list[str]:
    """What a training warns of."""
    from mlenv import compose, train

    torch.set_num_threads(1)
    handler = logging.handlers.BufferingHandler(100)
    logging.getLogger("mlenv").addHandler(handler)
    train(compose(ROOT / "examples/demo/ranker.yaml", settings))
    return [record.getMessage() for record in handler.buffer if record.levelno == logging.WARNING]


def run_example(folder: str) -> tuple[list[float], float]:
    """The losses of examples/fabric, and how far the logits of its checkpoint, loaded under another strategy, are from those saved."""
    from lightning.fabric import Fabric
    from torchrec import KeyedJaggedTensor

    from mlenv.loops.strategy import TorchRecStrategy

    _be_quiet()
    warnings.simplefilter("ignore")
    example = runpy.run_path(str(ROOT / "examples/fabric/two_towers.py"))
    losses, model = example["main"](folder)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=TorchRecStrategy(dense="ddp"))
    fabric.launch()
    other, optimizer = example["build"](fabric)
    state: dict[str, Any] = {"model": other, "optimizer": optimizer, "steps": 0}
    fabric.load(folder, state)
    assert state["steps"] == len(losses)
    assert {int(kept["step"]) for kept in optimizer.state.values()} == {len(losses)}
    ids = KeyedJaggedTensor(["user", "item"], torch.arange(200), lengths=torch.ones(200, dtype=torch.int32))
    with torch.no_grad():
        return losses, float((model(ids) - other(ids)).abs().max())


def _be_quiet() -> None:
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)


def save_apart(folder: Path) -> list[str]:
    """Saves while rank 1 is slow, then while it has no room; says what became of each."""
    import time

    from mlenv.loops import checkpoint
    from mlenv.loops.ranks import rank

    write_shards = checkpoint.write_shards

    def late(*arguments: Any) -> None:
        if rank() == 1:
            time.sleep(0.3)
        write_shards(*arguments)

    def full(*arguments: Any) -> None:
        if rank() == 1:
            raise OSError("no room")
        write_shards(*arguments)

    said = []
    for step, write in enumerate((late, full)):
        checkpoint.write_shards = write
        try:
            checkpoint.verify(checkpoint.save_checkpoint(folder, step, {f"own.{rank()}": torch.ones(3)}, {}))
            said.append("")
        except (OSError, ValueError) as error:
            said.append(str(error))
    return said
