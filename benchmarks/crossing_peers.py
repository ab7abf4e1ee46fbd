"""Crossing modules of other libraries, given the weights of ours, so that both compute the same.

Every function takes a module of ours and returns the peer as a function of the same ``(batch, fields * dim)`` inputs, and
the modules whose parameters it trains. ``make peers`` installs the libraries into ``.peers``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent.parent / ".peers"
NUM_FIELDS, DIM = 39, 16
INPUT_DIM = NUM_FIELDS * DIM


class Peer(nn.Module):
    """A peer's modules and how its own model calls them."""

    def __init__(self, call: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.call = call

    def forward(self, inputs: Tensor) -> Tensor:
        return self.call(inputs, *self.parts)


def library(name: str) -> Any:
    """A module of a peer, by its import path."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # last, so that nothing of ours is replaced
        package = sys.modules["deepctr_torch"] = ModuleType("deepctr_torch")
        package.__path__ = [str(FOLDER / "deepctr_torch")]  # its own __init__ asks the network for a newer version
    return importlib.import_module(name)


def fuxictr_zoo(model: str) -> ModuleType:
    """A model of FuxiCTR's repository that its wheel leaves out."""
    library("fuxictr.pytorch.models")
    file = FOLDER / "FuxiCTR" / "model_zoo" / model / "src" / f"{model}.py"
    if not file.is_file():
        raise ImportError(f"FuxiCTR's model_zoo/{model} is not in .peers")
    spec = importlib.util.spec_from_file_location(f"fuxictr_zoo_{model}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fields(inputs: Tensor) -> Tensor:
    return inputs.view(-1, NUM_FIELDS, DIM)


def copy_(target: Tensor, source: Tensor) -> None:
    """Copies a weight into the shape that the peer keeps it in."""
    with torch.no_grad():
        target.copy_(source.reshape(target.shape))


# Factorization machine. Peers have no first-order term over vectors; a linear layer beside them does that work.


def _fm(ours: Any, pairs: Callable[..., Tensor], *parts: nn.Module) -> Peer:
    if ours.first_order is None:
        return Peer(lambda inputs, *parts: pairs(inputs, *parts).flatten(1), *parts)
    first_order = nn.Linear(INPUT_DIM, 1, bias=False)
    copy_(first_order.weight, ours.first_order.weight)
    return Peer(lambda inputs, first_order, *parts: first_order(inputs) + pairs(inputs, *parts), first_order, *parts)


def _reduction(ours: Any, scalar: Any, vector: Any) -> Any:
    return vector if ours.first_order is None else scalar


def fm_fuxictr(ours: Any) -> Peer:
    product = library("fuxictr.pytorch.layers").InnerProductInteraction
    pairs = product(NUM_FIELDS, output=_reduction(ours, "product_sum", "bi_interaction"))
    return _fm(ours, lambda inputs, pairs: pairs(fields(inputs)), pairs)


def fm_deepctr(ours: Any) -> Peer:
    layers = library("deepctr_torch.layers.interaction")
    return _fm(ours, lambda inputs, pairs: pairs(fields(inputs)), _reduction(ours, layers.FM, layers.BiInteractionPooling)())


def fm_rechub(ours: Any) -> Peer:
    pairs = library("torch_rechub.basic.layers").FM(reduce_sum=_reduction(ours, True, False))
    return _fm(ours, lambda inputs, pairs: pairs(fields(inputs)), pairs)


def fm_torchfm(ours: Any) -> Peer:
    pairs = library("torchfm.layer").FactorizationMachine(reduce_sum=_reduction(ours, True, False))
    return _fm(ours, lambda inputs, pairs: pairs(fields(inputs)), pairs)


# Dot products of pairs.


def dot_fuxictr(ours: Any) -> Peer:
    pairs = library("fuxictr.pytorch.layers").InnerProductInteraction(NUM_FIELDS, output="inner_product")
    return Peer(lambda inputs, pairs: pairs(fields(inputs)), pairs)


def dot_deepctr(ours: Any) -> Peer:
    pairs = library("deepctr_torch.layers.interaction").InnerProductLayer()
    return Peer(lambda inputs, pairs: pairs(list(fields(inputs).split(1, dim=1))).flatten(1), pairs)


def dot_torchfm(ours: Any) -> Peer:
    pairs = library("torchfm.layer").InnerProductNetwork()
    return Peer(lambda inputs, pairs: pairs(fields(inputs)), pairs)


def dot_torchrec(ours: Any) -> Peer:
    """Puts its first field beside the products, which is cut off again."""
    pairs = library("torchrec.models.dlrm").InteractionArch(NUM_FIELDS - 1)
    return Peer(lambda inputs, pairs: pairs(inputs[:, :DIM], fields(inputs)[:, 1:])[:, DIM:], pairs)


# Cross networks.


def cross_net_fuxictr(ours: Any) -> Peer:
    net = library("fuxictr.pytorch.layers").CrossNetV2(INPUT_DIM, len(ours.layers))
    net.cross_layers.load_state_dict(ours.layers.state_dict())
    return Peer(lambda inputs, net: net(inputs), net)


def cross_net_deepctr(ours: Any) -> Peer:
    net = library("deepctr_torch.layers.interaction").CrossNet(INPUT_DIM, len(ours.layers), parameterization="matrix")
    copy_(net.kernels, torch.stack([layer.weight for layer in ours.layers]))
    copy_(net.bias, torch.stack([layer.bias for layer in ours.layers]))
    return Peer(lambda inputs, net: net(inputs), net)


def cross_net_rechub(ours: Any) -> Peer:
    """Adds the bias beside the product, not inside; the same while it is zero."""
    net = library("torch_rechub.basic.layers").CrossNetV2(INPUT_DIM, len(ours.layers))
    for layer, weight in zip(ours.layers, net.w, strict=True):
        nn.init.zeros_(layer.bias)
        copy_(weight.weight, layer.weight)
    return Peer(lambda inputs, net: net(inputs), net)


def cross_net_torchrec(ours: Any) -> Peer:
    net = library("torchrec.modules.crossnet").CrossNet(INPUT_DIM, len(ours.layers))
    for layer, weight, bias in zip(ours.layers, net.kernels, net.bias, strict=True):
        copy_(weight, layer.weight)
        copy_(bias, layer.bias)
    return Peer(lambda inputs, net: net(inputs), net)


def _low_rank(ours: Any, net: Any, names: tuple[str, str, str, str], transpose: bool) -> Peer:
    """Peers share one gate, without a bias, between their layers; the same while ours are equal and their biases zero."""
    experts, rank = ours.layers[0].num_experts, ours.layers[0].rank
    u, v, c, gates = (getattr(net, name) for name in names)
    for gate, weight in zip(gates, ours.layers[0].gate.weight, strict=True):
        copy_(gate.weight, weight)
    for place, layer in enumerate(ours.layers):
        copy_(layer.gate.weight, ours.layers[0].gate.weight)
        nn.init.zeros_(layer.gate.bias)
        copy_(u[place], layer.expand.weight.view(INPUT_DIM, experts, rank).transpose(0, 1))
        reduce = layer.reduce.weight.view(experts, rank, INPUT_DIM)
        copy_(v[place], reduce.transpose(1, 2) if transpose else reduce)
        copy_(c[place], layer.inner)
        copy_(net.bias[place], layer.expand.bias)
    return Peer(lambda inputs, net: net(inputs), net)


def low_rank_fuxictr(ours: Any) -> Peer:
    layer = ours.layers[0]
    net = library("fuxictr.pytorch.layers").CrossNetMix(INPUT_DIM, len(ours.layers), layer.rank, layer.num_experts)
    return _low_rank(ours, net, ("U_list", "V_list", "C_list", "gating"), transpose=True)


def low_rank_deepctr(ours: Any) -> Peer:
    layer = ours.layers[0]
    net = library("deepctr_torch.layers.interaction").CrossNetMix(INPUT_DIM, layer.rank, layer.num_experts, len(ours.layers))
    return _low_rank(ours, net, ("U_list", "V_list", "C_list", "gating"), transpose=True)


def low_rank_rechub(ours: Any) -> Peer:
    layer = ours.layers[0]
    net = library("torch_rechub.basic.layers").CrossNetMix(INPUT_DIM, len(ours.layers), layer.rank, layer.num_experts)
    return _low_rank(ours, net, ("u_list", "v_list", "c_list", "gating"), transpose=True)


def low_rank_torchrec(ours: Any) -> Peer:
    layer = ours.layers[0]
    mixture = library("torchrec.modules.crossnet").LowRankMixtureCrossNet
    net = mixture(INPUT_DIM, len(ours.layers), layer.num_experts, layer.rank, activation=torch.tanh)
    return _low_rank(ours, net, ("U_kernels", "V_kernels", "C_kernels", "gates"), transpose=False)


def gated_fuxictr(ours: Any) -> Peer:
    net = fuxictr_zoo("GDCN").GateCorssLayer(INPUT_DIM, len(ours.crosses))
    for place, (cross, gate) in enumerate(zip(ours.crosses, ours.gates, strict=True)):
        copy_(net.w[place].weight, cross.weight)
        copy_(net.b[place], cross.bias)
        copy_(net.wg[place].weight, gate.weight)
    return Peer(lambda inputs, net: net(inputs), net)


# Masks, two streams.


def masknet_fuxictr(ours: Any) -> Peer:
    zoo = fuxictr_zoo("MaskNet")
    linear = ours.blocks[0].hidden[0]
    ratio = ours.blocks[0].mask[0].out_features / linear.in_features
    if ours.is_serial:
        net = zoo.SerialMaskNet(INPUT_DIM, hidden_units=[linear.out_features] * len(ours.blocks), reduction_ratio=ratio)
    else:
        net = zoo.ParallelMaskNet(INPUT_DIM, num_blocks=len(ours.blocks), block_dim=linear.out_features, reduction_ratio=ratio)
    for block, other in zip(ours.blocks, net.mask_blocks, strict=True):
        other.mask_layer.load_state_dict(block.mask.state_dict())
        other.hidden_layer.load_state_dict(block.hidden.state_dict())

    def call(inputs: Tensor, net: nn.Module, *norms: nn.Module) -> Tensor:
        tokens = fields(inputs)
        pieces = tokens.chunk(NUM_FIELDS, dim=1)
        values = torch.cat([norm(piece) for norm, piece in zip(norms, pieces, strict=True)], dim=1)
        outputs: Tensor = net(inputs, values.flatten(start_dim=1))
        return outputs

    return Peer(call, net, *(nn.LayerNorm(DIM) for _ in range(NUM_FIELDS)))


def final_mlp_fuxictr(ours: Any) -> Peer:
    """Its gates, which read chosen features, are given all of them, as ours are."""
    block = library("fuxictr.pytorch.layers").MLP_Block
    fusion_type = library("model_zoo.LongCTR.FinalMLP.FinalMLP").InteractionAggregation
    linears = [[part for part in module.modules() if isinstance(part, nn.Linear)] for module in (*ours.gates, *ours.streams)]
    widths = [[part.out_features for part in parts] for parts in linears]
    gates = [block(INPUT_DIM, hidden[:-1], output_dim=INPUT_DIM, output_activation="Sigmoid") for hidden in widths[:2]]
    streams = [block(INPUT_DIM, hidden) for hidden in widths[2:]]
    for own, module in zip(linears, (*gates, *streams), strict=True):
        for mine, theirs in zip(own, (part for part in module.modules() if isinstance(part, nn.Linear)), strict=True):
            theirs.load_state_dict(mine.state_dict())
    fusion = fusion_type(widths[2][-1], widths[3][-1], ours.linear.out_features, ours.num_heads)
    first, second = ours.linear.weight.split([widths[2][-1], widths[3][-1]], dim=1)
    copy_(fusion.w_x.weight, first)
    copy_(fusion.w_y.weight, second)
    copy_(fusion.w_x.bias, ours.linear.bias)
    nn.init.zeros_(fusion.w_y.bias)
    heads = ours.bilinear.view(ours.num_heads, widths[2][-1] // ours.num_heads, -1, ours.linear.out_features)
    copy_(fusion.w_xy, heads.transpose(2, 3))

    def call(inputs: Tensor, fusion: nn.Module, *parts: nn.Module) -> Tensor:
        first, second = inputs * (parts[0](inputs) * 2), inputs * (parts[1](inputs) * 2)
        outputs: Tensor = fusion(parts[2](first), parts[3](second))
        return outputs

    return Peer(call, fusion, *gates, *streams)


# Attention between fields.


def _in_turn(inputs: Tensor, *layers: nn.Module) -> Tensor:
    tokens = fields(inputs)
    for layer in layers:
        tokens = layer(tokens)
    return tokens.flatten(1)


def autoint_fuxictr(ours: Any) -> Peer:
    """Where a layer keeps the width, its residual is the input itself; the same while ours is mapped by the identity."""
    attention = fuxictr_zoo("AutoInt").MultiHeadSelfAttention
    layers = []
    for layer in ours.layers:
        other = attention(layer.in_features, layer.out_features // 4, ours.num_heads)
        weights = layer.weight.chunk(4)
        for target, weight in zip((other.W_q, other.W_k, other.W_v), weights, strict=False):
            copy_(target.weight, weight)
        if other.W_res is None:
            nn.init.eye_(weights[3])
        else:
            copy_(other.W_res.weight, weights[3])
        layers.append(other)
    return Peer(_in_turn, *layers)


def autoint_deepctr(ours: Any) -> Peer:
    interacting = library("deepctr_torch.layers.interaction").InteractingLayer
    layers = []
    for layer in ours.layers:
        other = interacting(layer.in_features, ours.num_heads)
        for target, weight in zip((other.W_Query, other.W_key, other.W_Value, other.W_Res), layer.weight.chunk(4), strict=True):
            copy_(target, weight.t())
        layers.append(other)
    return Peer(_in_turn, *layers)


def autoint_rechub(ours: Any) -> Peer:
    """Divides the scores by the root of the width, which its queries make up for here."""
    interacting = library("torch_rechub.basic.layers").InteractingLayer
    layers = []
    for layer in ours.layers:
        other = interacting(layer.in_features, ours.num_heads)
        for target, weight in zip((other.W_Q, other.W_K, other.W_V, other.W_Res), layer.weight.chunk(4), strict=True):
            copy_(target.weight, weight)
        copy_(other.W_Q.weight, other.W_Q.weight / other.scale)
        layers.append(other)
    return Peer(_in_turn, *layers)


def transformer_torch(ours: Any) -> Peer:
    layers = []
    for layer in ours.layers:
        hidden = layer.feed_forward[1].out_features
        other = nn.TransformerEncoderLayer(DIM, layer.num_heads, hidden, 0.0, "gelu", batch_first=True, norm_first=True)
        copy_(other.self_attn.in_proj_weight, layer.projection.weight)
        copy_(other.self_attn.in_proj_bias, layer.projection.bias)
        other.self_attn.out_proj.load_state_dict(layer.mixing.state_dict())
        other.norm1.load_state_dict(layer.attention_norm.state_dict())
        for target, own in zip((other.norm2, other.linear1, other.linear2), (0, 1, 3), strict=True):
            target.load_state_dict(layer.feed_forward[own].state_dict())
        layers.append(other)
    embedding = nn.Embedding(NUM_FIELDS, DIM)
    copy_(embedding.weight, ours.field_embeddings)

    def call(inputs: Tensor, embedding: nn.Module, *layers: nn.Module) -> Tensor:
        tokens = fields(inputs) + embedding.weight
        for layer in layers:
            tokens = layer(tokens)
        return tokens.flatten(1)

    return Peer(call, embedding, *layers, nn.LayerNorm(DIM))
