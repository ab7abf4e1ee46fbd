"""One page about where a training step spends its time, and what limits it."""

from __future__ import annotations

from typing import Final

from mlenv.loops.step_profile import TRACE_FILE, StepProfile
from mlenv.pages.page import Cell, Table, render

PROFILE_PAGE: Final = "profile.html"

_MOST_OPERATORS: Final = 15
_MUCH: Final = 0.3
"""Share of the time from which on something is worth a change."""


def shares_of(profile: StepProfile) -> dict[str, float]:
    """Shares of the time by the clock. On a CPU they add up to 1; a GPU computes and sends beside the host."""
    seconds = max(profile.seconds, 1e-9)
    shares = {"waiting for data": profile.waiting_seconds / seconds}
    if profile.device.startswith("cuda"):
        shares |= {
            "kernels on the GPU": profile.device_seconds / seconds,
            "communication on the GPU": profile.communication_seconds / seconds,
        }
        return {**shares, "operators on the host": profile.host_seconds / seconds}
    computing, sending = profile.host_seconds / seconds, profile.communication_seconds / seconds
    rest = max(1 - shares["waiting for data"] - computing - sending, 0.0)
    return {**shares, "operators": computing, "communication": sending, "Python and all else": rest}


def limit_of(profile: StepProfile) -> str:
    """What limits the step, and what would help, in a sentence or two."""
    shares = shares_of(profile)
    waiting, is_gpu = shares["waiting for data"], profile.device.startswith("cuda")
    sending = shares["communication on the GPU" if is_gpu else "communication"]
    computing = shares["kernels on the GPU" if is_gpu else "operators"]
    if waiting > _MUCH:
        return (
            f"The step waits for data {waiting:.0%} of its time: rows are read and transformed too slowly. More data.workers.num_threads, "
            "workers on a Ray cluster, or transforms that are written once (mlenv data backfill) would help."
        )
    if sending > _MUCH:
        return (
            f"The processes send and receive {sending:.0%} of the time. loop.read_ahead, a narrower embeddings.communication_precision, "
            "another embeddings.sharding or larger batches would help; on a CPU it may also be one process waiting for a slower one."
        )
    if is_gpu and computing < 1 - _MUCH:
        return (
            f"The GPU computes only {computing:.0%} of the time: the host does not start kernels fast enough. loop.compile=cuda_graphs or "
            "larger batches would help."
        )
    if not is_gpu and shares["Python and all else"] > _MUCH:
        return (
            f"Python and what lies between operators take {shares['Python and all else']:.0%} of the time: the batches are small for this "
            "model. A larger data.batch_size or loop.compile=kernels would help."
        )
    return (
        f"The step computes {computing:.0%} of its time, as it should. What is left is to compute less or in a cheaper way: "
        "loop.precision=bf16-mixed where the device has it, loop.compile=kernels, smaller layers."
    )


def render_profile(profile: StepProfile, title: str) -> str:
    """The page as text."""
    is_gpu = profile.device.startswith("cuda")
    header = ["Operator", "Calls a step", "Host, ms a step", *(["GPU, ms a step"] if is_gpu else []), "Share"]
    rows = []
    for operator in profile.operators[:_MOST_OPERATORS]:
        own = operator.device_seconds if is_gpu else operator.host_seconds
        times = [operator.host_seconds, *([operator.device_seconds] if is_gpu else [])]
        figures = [f"{operator.calls / profile.num_steps:.1f}", *(f"{1e3 * seconds / profile.num_steps:.2f}" for seconds in times)]
        cells = [Cell(operator.name), *map(Cell, figures), Cell(f"{own / max(profile.seconds, 1e-9):.1%}")]
        rows.append(cells)
    return render(
        "pages/profile.html.j2",
        title=title,
        profile=profile,
        step_ms=f"{1e3 * profile.seconds / profile.num_steps:.1f}",
        limit=limit_of(profile),
        shares=[(name, min(share, 1.0), f"{share:.1%}") for name, share in shares_of(profile).items()],
        operators=Table(header, 1, rows),
        trace=TRACE_FILE,
    )
