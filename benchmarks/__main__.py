"""Runs the benchmarks that are named, or all, and writes what they measured to ``benchmarks/results/``."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line of mlenv does

import importlib
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import describe_machine

BENCHMARKS = (
    *("loader", "negative_sampling", "training_loop", "thread_budget", "scaling", "jagged_sequences", "crossings", "optimizers"),
    *("kuairand", "calibration", "frappe", "distillation", "checkpoints", "compile", "batch_inference", "promotion_noise", "replay"),
)
RESULTS = Path(__file__).parent / "results"


def main(names: list[str]) -> int:
    """Measures each benchmark in a folder of its own; returns 1 when a target was missed."""
    if unknown := set(names) - set(BENCHMARKS):
        print(f"unknown benchmarks: {sorted(unknown)}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    missed = []
    for name in names or BENCHMARKS:
        with tempfile.TemporaryDirectory(prefix="mlenv-bench-") as folder:
            result = importlib.import_module(f"benchmarks.{name}").measure(Path(folder))
        text = f"# {result.title}\n\n{result.table}\n\n{result.verdict}\n\n{describe_machine()}\n"
        print(text)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text)
        missed += [] if result.reached else [name]
    print(f"missed: {', '.join(missed)}" if missed else "every target was reached")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
