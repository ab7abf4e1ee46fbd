"""A strategy of Lightning Fabric for ranking models: tables sharded by TorchRec, all else data parallel.

It needs nothing else of mlenv: ``Fabric(strategy=TorchRecStrategy(), devices=8)``; examples/fabric has a whole script.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import _init_optim_state
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mlenv.errors import require
from mlenv.loops.ranks import average_gradients, share, world_size
from mlenv.loops.sharding import collections_of, shard_tables
from mlenv.loops.table_memory import TablePlacement

if TYPE_CHECKING:
    from torchrec.distributed.planner import ParameterConstraints


class TorchRecStrategy(DDPStrategy):
    """Shards TorchRec's collections over the processes and makes the rest of a model data parallel.

    It is Fabric's DDPStrategy in everything but what becomes of a module and what is saved of it, and so subclasses it: processes,
    devices and collectives are the same. A model without collections is all rest. One process trains as many do, without sending
    anything.

    Give the tables their optimizers before the setup, as TorchRec wants it (``apply_optimizer_in_backward``), and the rest an ordinary
    one after it, over the parameters without ``_in_backward_optimizers``. Tables may be on the meta device until then.

    ``fabric.save`` writes PyTorch's distributed checkpoints, each rank its own shards, which load on another number of processes and
    with another ``dense``. ``fabric.load`` reads them into the model and optimizers that it is given.

    Args:
        constraints: what TorchRec's planner is to keep to, by table; it chooses for the others.
        communication_precision: ``fp16`` or ``bf16`` sends vectors between processes in half the bits; ``fp32`` as they are.
        dense: ``ddp`` copies the rest to every process; ``fsdp`` divides its parameters, gradients and optimizer states too
            (FSDP2, ``fully_shard``), which large towers need: each child of the model is gathered for as long as it computes. Plain
            tables with sparse gradients are copied either way.
    """

    def __init__(
        self,
        constraints: Mapping[str, ParameterConstraints] | None = None,
        dense: Literal["ddp", "fsdp"] = "ddp",
        communication_precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        super().__init__()
        self._communication_precision = communication_precision
        self._constraints, self._dense = dict(constraints or {}), dense
        self._backward_sync_control = _SyncControl()
        self.placements: dict[str, TablePlacement] = {}
        """Where each table of TorchRec lies, once a module is set up."""

    def _configure_launcher(self) -> None:
        """One process starts no others, and so runs in a notebook too."""
        if self.num_processes * self.num_nodes > 1:
            super()._configure_launcher()

    def setup_environment(self) -> None:
        """Joins the other processes; alone, it makes a group of one that needs no network."""
        if self.num_processes * self.num_nodes == 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
        super().setup_environment()

    def module_to_device(self, module: nn.Module) -> None:
        """Moves a model whose tables have a place already."""
        if not collections_of(module):
            super().module_to_device(module)

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """The module, distributed.

        Raises:
            ConfigError: the tables do not fit into the memory of the ranks, or not as asked.
        """
        if collections_of(module):
            require("torchrec", extra="torchrec")
            wrapper = _FullyShardTheRest() if self._dense == "fsdp" and world_size() > 1 else None
            sharded, placements = shard_tables(module, self.root_device, self._constraints, wrapper, self._communication_precision)
            self.placements |= placements
            return cast(nn.Module, sharded)
        module = module.to(self.root_device)
        if world_size() == 1:
            return module
        if self._dense == "fsdp":
            fully_shard_dense(module, self.root_device)
            return module
        distributed: nn.Module = super().setup_module(module)
        return distributed

    def save_checkpoint(self, path: Any, state: dict[str, Any], storage_options: Any = None, filter: Any = None) -> None:
        """Writes a folder; all ranks call this."""
        assert storage_options is None, "the folder is written by torch.distributed.checkpoint"
        converted = self._convert_stateful_objects_in_state(_with_fused(state), filter or {})
        save(converted, checkpoint_id=self.broadcast(path))

    def load_checkpoint(self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a folder into the state, in place; what is no module, optimizer or tensor is put into the dictionary."""
        assert isinstance(state, dict), "name what is to be loaded: fabric.load(path, {'model': model})"
        objects = _with_fused(state)
        for optimizer in (value for value in state.values() if isinstance(value, Optimizer)):
            _init_optim_state(optimizer)  # what is read needs a place
        # Flattened here: where a rank has no part of a table, torch's planner takes the checkpoint for one of an older torch.
        flat, places = flatten_state_dict(self._convert_stateful_objects_in_state(objects, {}))
        load(
            flat,
            checkpoint_id=Path(self.broadcast(path)),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        )
        stored = unflatten_state_dict(flat, places)
        for name, value in objects.items():
            if isinstance(value, Optimizer):
                value.load_state_dict(stored[name])
            elif name in state and not isinstance(value, (nn.Module, Tensor)):
                state[name] = stored[name]
        return {}


class _SyncControl(_BackwardSyncControl):
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        return without_synchronization(module) if enabled else nullcontext()


@contextmanager
def without_synchronization(model: nn.Module) -> Iterator[None]:
    """Backward passes inside leave each rank its own gradients, added up; one after it averages the sums over the ranks.

    FSDP goes on averaging each: a whole gradient that waits on every rank would cost the memory that it is there to save.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        for copy in (parameter for parameter in model.parameters() if hasattr(parameter, _IS_AVERAGED)):
            setattr(copy, _IS_AVERAGED, False)
            stack.callback(setattr, copy, _IS_AVERAGED, True)
        yield


def fully_shard_dense(model: nn.Module, device: torch.device, tables: Collection[nn.Parameter] = ()) -> None:
    """Divides the parameters of a model over the ranks by FSDP2, child by child, without renaming any.

    Tables with sparse gradients, which FSDP cannot add up, stay whole on every rank, and their gradients are averaged when a backward
    pass has left them.

    Args:
        tables: parameters that are divided already.
    """
    copies = [
        cast(nn.Parameter, module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
    ]
    for parameter in copies:
        setattr(parameter, _IS_AVERAGED, True)
        parameter.register_post_accumulate_grad_hook(_average)  # type: ignore[no-untyped-call]
    whole = {*tables, *copies}
    with torch.no_grad():
        share(tensor for tensor in (*model.parameters(), *model.buffers()) if tensor not in set(tables))
    mesh = init_device_mesh(device.type, (world_size(),))
    for child in model.children():
        own = set(child.parameters())
        if own and not own & whole and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # which are not called themselves
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=whole)


_IS_AVERAGED = "_is_averaged_by_strategy"


def _average(parameter: Tensor) -> None:
    if getattr(parameter, _IS_AVERAGED):
        average_gradients([parameter])


class _FullyShardTheRest:
    """What TorchRec calls when the tables have their place: a ``DataParallelWrapper``."""

    def wrap(self, model: Any, environment: Any, device: torch.device) -> None:
        from torchrec.distributed.types import ShardedModule

        rest = model._dmp_wrapped_module = model._dmp_wrapped_module.to(device)
        sharded = (part for module in rest.modules() if isinstance(module, ShardedModule) for part in module.modules())
        tables = {parameter for part in sharded for parameter in part._parameters.values() if parameter is not None}
        fully_shard_dense(rest, device, tables)


def _with_fused(state: Mapping[str, Any]) -> dict[str, Any]:
    """With the optimizers that TorchRec's tables have inside of a model, each by a name of its own."""
    fused = {f"{name}.fused_optimizer": value.fused_optimizer for name, value in state.items() if hasattr(value, "fused_optimizer")}
    return {**state, **fused}
