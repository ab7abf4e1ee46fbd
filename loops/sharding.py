"""Where TorchRec's tables lie: chosen by its planner within what is asked for, checked against the memory that is there."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn

from mlenv.config import EmbeddingsConfig
from mlenv.errors import ConfigError, MlenvError, require
from mlenv.loops.ranks import is_main, object_from_main, world_size
from mlenv.loops.table_memory import FLOAT_BYTES, TablePlacement, TableShard, check_memory, free_bytes, state_bytes
from mlenv.modules.embeddings import fill_initial_rows

if TYPE_CHECKING:
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.model_parallel import DataParallelWrapper
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
    from torchrec.distributed.types import ShardingPlan

logger = logging.getLogger(__name__)


def fuse_optimizers(model: nn.Module, config: EmbeddingsConfig) -> None:
    """Gives TorchRec's tables the optimizers of the config, which update them inside the backward pass."""
    require("torchrec", extra="torchrec")
    from torch.distributed.optim import (  # type: ignore[attr-defined]
        _apply_optimizer_in_backward as apply_optimizer_in_backward,
    )
    from torchrec.optim import SGD, RowWiseAdagrad

    for collection in collections_of(model):
        for name, parameter in collection.named_parameters():
            own = config.of(table_of(name))
            options = {"lr": own.learning_rate}
            if own.optimizer == "row_wise_adagrad":
                options["eps"] = own.eps
            apply_optimizer_in_backward(RowWiseAdagrad if own.optimizer == "row_wise_adagrad" else SGD, [parameter], options)


def fill_tables(model: nn.Module, config: EmbeddingsConfig, dims: Mapping[str, int], seed: int) -> None:
    """Fills this rank's part of every sharded table with its initial rows.

    Args:
        dims: width of each table.
    """
    for name, weight in model.state_dict().items():
        if is_table(name):
            table = table_of(name)
            for part, first_row, first_column in _local_parts(weight):
                whole = part if part.shape[1] == dims[table] else part.new_empty(part.shape[0], dims[table])
                fill_initial_rows(whole, first_row, table, config.init_std, seed)
                if whole is not part:  # a row's numbers are drawn together
                    part.copy_(whole[:, first_column : first_column + part.shape[1]])


def constraints_of(config: EmbeddingsConfig, dims: Mapping[str, int], num_ranks: int) -> dict[str, ParameterConstraints]:
    """What the config asks the planner for, by table.

    Args:
        dims: width of each table.
    """
    require("torchrec", extra="torchrec")
    from torchrec.distributed.planner import ParameterConstraints

    def constraint(sharding: str, dim: int) -> ParameterConstraints:
        # TorchRec leaves tables of less than 128 columns whole unless it is told how narrow a part may be.
        columns = max(-(-dim // num_ranks) // 4 * 4, 4)
        return ParameterConstraints(sharding_types=[sharding], min_partition=columns)

    return {table: constraint(wanted, dim) for table, dim in dims.items() if (wanted := config.of(table).sharding)}


def shard_tables(
    model: nn.Module,
    device: torch.device,
    constraints: Mapping[str, ParameterConstraints],
    dense: DataParallelWrapper | None = None,
    communication_precision: str = "fp32",
) -> tuple[DistributedModelParallel, dict[str, TablePlacement]]:
    """Gives the model's TorchRec tables a place and memory, and makes the rest data parallel. A process group is there already.

    Args:
        constraints: by table, for TorchRec's planner. One that names no sharding takes what trains the same on any number of ranks,
            and all take fused kernels.
        dense: makes the rest data parallel; None takes DistributedDataParallel.
        communication_precision: as of the config's ``embeddings``.

    Returns:
        the model, and where each table lies.

    Raises:
        ConfigError: the tables do not fit into the memory of the ranks, or the planner finds no place as asked.
    """
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology

    codecs = _codecs(communication_precision, device)
    sharders: list[Any] = [
        EmbeddingBagCollectionSharder(qcomm_codecs_registry=codecs),
        EmbeddingCollectionSharder(qcomm_codecs_registry=codecs),
    ]
    with warnings.catch_warnings(), quiet("torchrec"), quiet(""):
        warnings.simplefilter("ignore")  # the planner talks of hardware that a user cannot change
        free = free_bytes(device)
        topology = Topology(
            world_size=world_size(),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size())),
            compute_device=device.type,
            **{"hbm_cap" if device.type == "cuda" else "ddr_cap": free},
        )
        planner = EmbeddingShardingPlanner(topology=topology, constraints=_completed(model, constraints))
        planned: tuple[ShardingPlan, dict[str, TablePlacement]] | MlenvError
        planned = object_from_main(lambda: _plan(planner, model, sharders, free))
        if isinstance(planned, MlenvError):
            raise planned
        plan, placements = planned
        check_memory(placements, free)
        if world_size() > 1 and is_main():
            for table, placement in placements.items():
                logger.info("table %s: %s", table, placement)
        # A single process averages no gradients: the wrapper that does it would only copy them, some milliseconds a step.
        sharded = DistributedModelParallel(
            model, device=device, plan=plan, sharders=sharders, init_data_parallel=world_size() > 1, data_parallel_wrapper=dense
        ).to(device)
    # Says at the first forward pass how torch's own callers should ask whether they are traced.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    return sharded, placements


def collections_of(model: nn.Module) -> list[nn.Module]:
    """TorchRec's collections of tables in a model; none without TorchRec."""
    return [module for module in model.modules() if type(module).__name__ in ("EmbeddingBagCollection", "EmbeddingCollection")]


def is_table(name: str) -> bool:
    """Whether a name of a TorchRec state dict is an embedding table."""
    return ".embedding_bags." in name or (".embeddings." in name and ".collections." in name)


def table_of(name: str) -> str:
    """The table in ``...embedding_bags.item.weight``."""
    return name.removesuffix(".weight").rsplit(".", 1)[1]


def _completed(model: nn.Module, constraints: Mapping[str, ParameterConstraints]) -> dict[str, ParameterConstraints]:
    """Constraints of every table."""
    from dataclasses import replace

    from torchrec.distributed.embedding_types import EmbeddingComputeKernel
    from torchrec.distributed.planner import ParameterConstraints

    completed = {}
    for table in _tables(model):
        asked = constraints.get(table.name, ParameterConstraints())
        kinds = asked.sharding_types or _sharding_types(table.num_embeddings)
        completed[table.name] = replace(asked, sharding_types=kinds, compute_kernels=[EmbeddingComputeKernel.FUSED.value])
    return completed


def _plan(
    planner: EmbeddingShardingPlanner, model: nn.Module, sharders: list[Any], free: int
) -> tuple[ShardingPlan, dict[str, TablePlacement]] | MlenvError:
    """What the planner chose and what it expects of it; or why there is no plan."""
    from torchrec.distributed.planner.types import PlannerError, PlannerErrorType

    sizes = {table.name: table.num_embeddings * table.embedding_dim * FLOAT_BYTES for table in _tables(model)}
    try:
        plan = planner.plan(model, sharders)
    except (PlannerError, RuntimeError) as error:  # RuntimeError: a collection has no such sharding on this device
        if getattr(error, "error_type", None) is PlannerErrorType.INSUFFICIENT_STORAGE:
            shards = {name: TablePlacement("nowhere", "", (TableShard(0, 0, 0, -(-size // world_size())),)) for name, size in sizes.items()}
            try:
                check_memory(shards, free, of_all_ranks=True)
            except ConfigError as refused:
                return refused
        fix = "choose another sharding, or none; on a CPU TorchRec divides the rows of tables of sequences alone, not of bags"
        return ConfigError("embeddings.sharding", expected="a place for every table", received=" ".join(str(error).split())[:300], fix=fix)
    milliseconds = {option.name: option.total_perf for option in getattr(planner, "_best_plan", None) or ()}
    optimizers = {
        table_of(name): getattr(parameter, "_optimizer_classes", [])
        for collection in collections_of(model)
        for name, parameter in collection.named_parameters()
    }
    placements = {}
    for places in plan.plan.values():
        for table, chosen in places.items():
            names = [kind.__name__ for kind in optimizers[table]]
            shards_of_table = tuple(
                TableShard(
                    piece.placement.rank(),
                    rows,
                    columns,
                    rows * columns * FLOAT_BYTES + (state_bytes("row_wise_adagrad", rows, columns) if "RowWiseAdagrad" in names else 0),
                )
                for piece in chosen.sharding_spec.shards
                for rows, columns in [piece.shard_sizes]
            )
            placements[table] = TablePlacement(chosen.sharding_type, chosen.compute_kernel, shards_of_table, milliseconds.get(table))
    return plan, placements


def _tables(model: nn.Module) -> Iterator[Any]:
    """Configs of the tables of all collections."""
    for collection in collections_of(model):
        bags = getattr(collection, "embedding_bag_configs", None)
        yield from bags() if bags is not None else collection.embedding_configs()  # type: ignore[operator]


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
    with quiet("torchrec"), quiet(""):
        codecs: dict[str, Any] | None = get_qcomm_codecs_registry(options, device=device)
    return codecs


def _sharding_types(num_rows: int) -> list[str]:
    """What the planner may choose from for a table that nothing is asked for.

    Not copies, which it prefers for small tables: they have no fused optimizer. Nothing that cuts between columns, of which each
    would have a row-wise optimizer state of its own. And nothing that cuts between rows where a rank would get none: fbgemm 1.8 on
    a CPU takes an empty table for one on a GPU.
    """
    per_rank = -(-num_rows // world_size())
    has_empty_part = per_rank * (world_size() - 1) >= num_rows
    return ["table_wise"] if has_empty_part and world_size() > 1 else ["table_wise", "row_wise"]


def _local_parts(weight: Any) -> list[tuple[Tensor, int, int]]:
    """The parts of a sharded table that this rank holds, and the first row and column of each."""
    if isinstance(weight, Tensor) and not hasattr(weight, "local_shards"):
        return [(weight, 0, 0)]
    return [(piece.tensor, *piece.metadata.shard_offsets) for piece in weight.local_shards()]


class quiet:
    """Holds back the warnings of a logger, by name; the root logger's name is empty."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
