"""Models whose tables live in TorchRec: placed on ranks by its planner, updated by its fused optimizer."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from mlenv.config import EmbeddingsConfig
from mlenv.errors import ConfigError, require
from mlenv.loops.ranks import world_size
from mlenv.modules.embeddings import fill_initial_rows

logger = logging.getLogger(__name__)


def shard(model: nn.Module, config: EmbeddingsConfig, device: torch.device, seed: int) -> nn.Module:
    """Gives the model's TorchRec tables a place, memory, initial rows and a fused optimizer.

    One process goes the same way as many. A process group is started when there is none.
    """
    require("torchrec", extra="torchrec")
    from torch.distributed.optim import (  # type: ignore[attr-defined]
        _apply_optimizer_in_backward as apply_optimizer_in_backward,
    )
    from torchrec import EmbeddingBagCollection, EmbeddingCollection
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embedding_types import EmbeddingComputeKernel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.optim import SGD, RowWiseAdagrad

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    constraints = {}
    for module in model.modules():
        if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)):
            for name, parameter in module.named_parameters():
                own = config.of(table_of(name))
                options = {"lr": own.learning_rate}
                if own.optimizer == "row_wise_adagrad":
                    options["eps"] = own.eps
                apply_optimizer_in_backward(RowWiseAdagrad if own.optimizer == "row_wise_adagrad" else SGD, [parameter], options)
            for table in module.embedding_bag_configs() if isinstance(module, EmbeddingBagCollection) else module.embedding_configs():
                wanted = config.of(table.name).sharding
                constraints[table.name] = ParameterConstraints(
                    sharding_types=[wanted] if wanted else _sharding_types(table.num_embeddings),
                    compute_kernels=[EmbeddingComputeKernel.FUSED.value],
                )
    codecs = _codecs(config.communication_precision, device)
    sharders = [EmbeddingBagCollectionSharder(qcomm_codecs_registry=codecs), EmbeddingCollectionSharder(qcomm_codecs_registry=codecs)]
    group = torch.distributed.group.WORLD
    assert group is not None
    with warnings.catch_warnings(), _quiet("torchrec"), _quiet(""):
        warnings.simplefilter("ignore")  # the planner talks of hardware that a user cannot change
        planner = EmbeddingShardingPlanner(topology=Topology(world_size=group.size(), compute_device=device.type), constraints=constraints)
        plan = planner.collective_plan(model, sharders, group)
        if group.size() > 1 and group.rank() == 0:
            for place in plan.plan.values():
                for table_name, chosen in place.items():
                    logger.info("table %s: %s on ranks %s", table_name, chosen.sharding_type, chosen.ranks)
        # A single process averages no gradients: the wrapper that does it would only copy them, some milliseconds a step.
        sharded: nn.Module = DistributedModelParallel(
            model, device=device, plan=plan, sharders=sharders, init_data_parallel=group.size() > 1
        ).to(device)
    # Says at the first forward pass how torch's own callers should ask whether they are traced.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    for name, weight in sharded.state_dict().items():
        if is_table(name):
            for rows, first_row in _local_rows(weight):
                fill_initial_rows(rows, first_row, table_of(name), config.init_std, seed)
    return sharded


def _codecs(precision: str, device: torch.device) -> dict[str, Any] | None:
    """What brings vectors to a narrower type before they are sent, and back; None sends them as they are.

    Gradients of a mean over many rows are too small for fp16: bf16, which gloo does not send, has the range of float32.
    """
    from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry

    if precision == "fp32":
        return None
    is_cpu = device.type == "cpu"
    if is_cpu and precision == "bf16":
        fix = "set it to fp16, or train on GPUs"
        raise ConfigError("embeddings.communication_precision", expected="fp32 or fp16 on a CPU", received=precision, fix=fix)
    gradients = CommType.FP32 if is_cpu else CommType.BF16
    options = QCommsConfig(forward_precision=CommType[precision.upper()], backward_precision=gradients)
    with _quiet("torchrec"), _quiet(""):
        codecs: dict[str, Any] | None = get_qcomm_codecs_registry(options, device=device)
    return codecs


def _sharding_types(num_rows: int) -> list[str]:
    """What the planner may choose from for a table.

    Not copies, which it prefers for small tables: they have no fused optimizer. And nothing that cuts between rows where a rank
    would get none: fbgemm 1.8 on a CPU takes an empty table for one on a GPU.
    """
    from torchrec.distributed.types import ShardingType

    per_rank = -(-num_rows // world_size())
    cut_rows = {ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD}
    left_out = {ShardingType.DATA_PARALLEL} | (cut_rows if per_rank * (world_size() - 1) >= num_rows else set())
    return [kind.value for kind in ShardingType if kind not in left_out]


def is_table(name: str) -> bool:
    """Whether a name of a TorchRec state dict is an embedding table."""
    return ".embedding_bags." in name or (".embeddings." in name and ".collections." in name)


def table_of(name: str) -> str:
    """The table in ``...embedding_bags.item.weight``."""
    return name.removesuffix(".weight").rsplit(".", 1)[1]


def _local_rows(weight: Any) -> list[tuple[Tensor, int]]:
    """The rows of a sharded table that this rank holds, and the number of the first."""
    if isinstance(weight, Tensor) and not hasattr(weight, "local_shards"):
        return [(weight, 0)]
    return [(piece.tensor, piece.metadata.shard_offsets[0]) for piece in weight.local_shards()]


class _quiet:
    """Holds back the warnings of a logger, by name; the root logger's name is empty."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
