"""Device, precision, strategy and processes of a training, as Lightning Fabric takes them."""

from __future__ import annotations

import logging
import os

from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from mlenv.config import ExperimentConfig
from mlenv.loops.ranks import started_by_launcher
from mlenv.loops.sharding import constraints_of
from mlenv.loops.strategy import TorchRecStrategy


def make_fabric(config: ExperimentConfig) -> Fabric:
    """Device, precision and strategy; with a launcher's processes in one group when it is launched."""
    loop, embeddings, is_launched = config.loop, config.embeddings, started_by_launcher()
    num_processes = int(os.environ["WORLD_SIZE"]) if is_launched else 1
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes)) if is_launched else 1
    strategy: str | TorchRecStrategy = "auto"
    if is_launched or embeddings.engine == "torchrec":
        constraints = constraints_of(embeddings, config.schema.table_dims, num_processes) if embeddings.engine == "torchrec" else None
        strategy = TorchRecStrategy(constraints, "fsdp" if loop.strategy == "fsdp" else "ddp", embeddings.communication_precision)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # which processes there are, the log says already
    return Fabric(
        accelerator=loop.device,
        devices=num_local,
        num_nodes=num_processes // num_local,
        precision=loop.precision,
        strategy=strategy,
        plugins=[TorchElasticEnvironment()] if is_launched else None,
    )
