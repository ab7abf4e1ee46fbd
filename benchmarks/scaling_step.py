"""Steps of one size, without reading: a contender of ``benchmarks.scaling``.

``python -m benchmarks.scaling_step ENGINE NUM_CATEGORICAL NUM_EMBEDDINGS BATCH_SIZE NUM_RANKS FOLDER`` takes as many steps as each line of
its input says; it starts the other ranks itself, and they end with it. A rate is in steps a second.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

from benchmarks.criteo_shaped import schema_of, write_set
from benchmarks.training_turns import serve
from mlenv.config import DataConfig, EmbeddingsConfig, ExperimentConfig, TrackingConfig, WindowConfig
from mlenv.experiment import Experiment
from mlenv.loops.fit import Progress
from mlenv.loops.ranks import is_main, object_from_main
from mlenv.modules import MLPConfig, RankerConfig

BATCHES = 8
"""Of each rank, held in memory and trained on again and again."""


def main(engine: str, num_categorical: int, num_embeddings: int, batch_size: int, num_ranks: int, folder: Path) -> None:
    if "RANK" not in os.environ:
        folder.mkdir()
        write_set(folder, BATCHES * batch_size * num_ranks, num_embeddings, batch_size, num_categorical=num_categorical)
        if num_ranks > 1:
            _start_others(num_ranks)
    config = ExperimentConfig(
        name="scaling",
        output=str(folder / "run"),
        schema=schema_of(num_embeddings, num_categorical),
        data=DataConfig(path=str(folder), train=WindowConfig(), batch_size=batch_size),
        model=RankerConfig(crossing=None, deep=MLPConfig(hidden=(64, 32)), heads=MLPConfig(hidden=())),
        embeddings=EmbeddingsConfig(engine=engine),  # type: ignore[arg-type]
        tracking=TrackingConfig(enabled=False),
    )
    with Experiment(config) as experiment:
        step = experiment.step
        batches = itertools.cycle(list(experiment.source("train").batches()))

        def train(steps: int) -> int:
            steps = object_from_main(lambda: steps)
            for _ in range(steps):
                assert step.advance(batches, Progress()) is not None
            return steps

        if is_main():
            serve(train)
        while not is_main():
            train(0)


def _start_others(num_ranks: int) -> None:
    """Makes this process rank 0 and starts the rest. They wait for what rank 0 says, and fail once it is gone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    for rank in reversed(range(num_ranks)):
        os.environ |= {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        if rank:
            subprocess.Popen([sys.executable, "-m", "benchmarks.scaling_step", *sys.argv[1:]], stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]), Path(sys.argv[6]))
