"""Training while another process keeps a core busy, beside training on one core that is free."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.comparison import Result, markdown_table
from benchmarks.criteo_shaped import write_set
from benchmarks.training_turns import Contender, Turn, median_ratio, rates_in_turn

NUM_EMBEDDINGS, REPETITIONS, SECONDS, TARGET = 10_000, 5, 3.0, 0.8
REFERENCE = "one core, free, the other busy"
"""What a machine has left: virtual cores that share a physical one slow each other down, so an idle neighbour would be no measure."""


def measure(folder: Path) -> Result:
    write_set(folder, 8 * 65_536, NUM_EMBEDDINGS)
    training = ["-m", "benchmarks.mlenv_training", "deepfm", "32-true", "none", str(folder / "part-00000.parquet"), str(NUM_EMBEDDINGS)]
    two = set(sorted(os.sched_getaffinity(0))[:2])
    with ExitStack() as stack:

        def contender(name: str, cores: set[int], environment: dict[str, str]) -> Contender:
            return stack.enter_context(Contender(training, environment, folder / f"{name}.log", cores))

        passive = {"OMP_WAIT_POLICY": "PASSIVE"}
        ways: dict[str, Turn] = {
            "one core, free, the other idle": contender("alone", {min(two)}, passive),
            REFERENCE: Beside(contender("one", {min(two)}, passive), two - {min(two)}),
            "two cores, free": contender("two", two, passive),
            "two cores, one busy": Beside(contender("busy", two, passive), two),
            "two cores, one busy, spinning": Beside(contender("spinning", two, {"OMP_WAIT_POLICY": "ACTIVE"}), two),
        }
        rates = rates_in_turn(ways, REPETITIONS, SECONDS, batch_size=4096)
    ratio = median_ratio(rates, "two cores, one busy", REFERENCE)
    rows = [[name, f"{statistics.median(rates[name]) / 1e3:.0f} k", f"{median_ratio(rates, name, REFERENCE):.2f}"] for name in ways]
    return Result(
        "Training beside a busy process: DeepFM from Parquet, rows/s",
        markdown_table(["cores", "rows/s", "of one free core beside a busy one"], rows),
        f"With one of two cores busy: {ratio:.2f} of what the core that is left gives (target: at least {TARGET}). "
        "In the last line threads spin while they wait, which the command line of mlenv does not let them.",
        ratio >= TARGET,
    )


class Beside:
    """A contender whose turns are taken beside a process that never waits."""

    def __init__(self, contender: Contender, cores: set[int]) -> None:
        self._contender, self._cores = contender, cores

    def rate(self, steps: int) -> float:
        limited: Callable[[], None] = lambda: os.sched_setaffinity(0, self._cores)  # noqa: E731
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=limited)
        try:
            return self._contender.rate(steps)
        finally:
            busy.kill()
            busy.wait()
