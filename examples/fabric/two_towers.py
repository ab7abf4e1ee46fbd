"""Lightning Fabric with TorchRec's tables, and nothing else of mlenv: ``torchrun --nproc-per-node 2 examples/fabric/two_towers.py``."""

from __future__ import annotations

import sys

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.planner import ParameterConstraints
from torchrec.optim import RowWiseAdagrad

from mlenv.loops.strategy import TorchRecStrategy


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        tables = [EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=1000, embedding_dim=16) for name in ("user", "item")]
        self.tables = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))  # they get memory where they are to lie
        self.user, self.item = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        found = self.tables(ids)
        return (self.user(found["user"]) * self.item(found["item"])).sum(1)


def build(fabric: Fabric) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = TwoTowers()
    _apply_optimizer_in_backward(RowWiseAdagrad, model.tables.parameters(), {"lr": 0.1})
    model = fabric.setup_module(model)
    rest = [parameter for parameter in model.parameters() if not hasattr(parameter, "_in_backward_optimizers")]
    return model, torch.optim.AdamW(rest, lr=0.01)


def main(folder: str) -> tuple[list[float], nn.Module]:
    strategy = TorchRecStrategy({"item": ParameterConstraints(sharding_types=["table_wise"])}, dense="fsdp")
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model, optimizer = build(fabric)
    generator, losses = torch.Generator().manual_seed(fabric.global_rank), []
    for _ in range(30):
        users, items = torch.randint(0, 1000, (2, 64), generator=generator)
        ids = KeyedJaggedTensor(["user", "item"], torch.cat([users, items]), lengths=torch.ones(128, dtype=torch.int32))
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids), (items < 500).float())
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss.detach(), reduce_op="mean").item())
    fabric.save(folder, {"model": model, "optimizer": optimizer, "steps": len(losses)})
    fabric.print(f"item: {strategy.placements['item']}; loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return losses, model


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "work/two-towers")
