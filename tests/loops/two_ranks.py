"""What one of two processes does for test_read_ahead.py: the same training in several ways, one after another."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from mlenv import Experiment, compose, fit
from mlenv.loops.journal import Journal


def main(folder: Path, arguments: list[str]) -> None:
    """Writes the losses and positions of every way of the file ``ways.json`` that this rank saw."""
    torch.distributed.init_process_group("gloo")
    found = {}
    for way, settings in json.loads((folder / "ways.json").read_text()).items():
        config = compose(arguments[0], [*arguments[1:], f"output={folder / way}", *settings])
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
    (folder / f"rank{sys.argv[2]}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:])
