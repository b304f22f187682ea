"""How the layer's time and memory grow with experts, tokens and width."""

from typing import Any

import numpy as np
import torch

from diffmoe.benchmarks.layer import mixture_of, saved_bytes, work_of
from diffmoe.benchmarks.memory import peak_growth
from diffmoe.benchmarks.report import Report
from diffmoe.benchmarks.timing import take_turns
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.models.moe import MoEFeedForward

AXES = ("E", "S", "D")


def sweeps(config: Config) -> dict[str, list[int]]:
    """The values along each axis; the other two stay at E = 16, S = 2048 and the recipe's D."""
    width = config.model.width
    return {
        "E": [4, 8, 16, 32, 64],
        "S": [1024, 4096, 16384, 65536],
        "D": [width // 2, width, 2 * width],
    }


def benchmark_growth(
    config: Config, largest: int, rounds: int, device: torch.device, report: Report
) -> None:
    """One axis after the other; largest: most tokens of a point.

    The report gets the points, and the slopes on logarithmic axes (1: linear).
    """
    usual = {"E": 16, "S": min(2048, largest), "D": config.model.width}
    for axis, values in sweeps(config).items():
        along = []
        for value in values:
            shape = usual | {axis: value}
            if shape["S"] <= largest:
                along.append({"axis": axis, **shape, **_measured(config, shape, rounds, device)})
        for quantity in ("seconds", "saved_bytes", "peak_bytes"):
            known = [(one[axis], one[quantity]) for one in along if one[quantity]]
            if len(known) > 1:
                slope = float(np.polyfit(*np.log(np.array(known, float)).T, 1)[0])
                report.add(f"{quantity} against {axis}, slope on log axes", slope, "")
        report.points.extend(along)


def _measured(
    config: Config, shape: dict[str, int], rounds: int, device: torch.device
) -> dict[str, float | None]:
    # The layer has no heads; the configuration wants some that divide the width.
    changes = {"model.width": shape["D"], "model.heads": 1, "moe.experts": shape["E"]}
    candidate = mixture_of(config.replace(changes), MoEFeedForward, device)
    dtype = next(candidate.module.parameters()).dtype
    tokens = torch.randn(1, shape["S"], shape["D"], dtype=dtype, device=device).requires_grad_()
    work = work_of(candidate, tokens)
    return {
        "seconds": take_turns({"layer": work}, rounds, device).median("layer"),
        "saved_bytes": saved_bytes(candidate, tokens),
        "peak_bytes": peak_growth(work, device),
    }


def draw(points: list[dict[str, Any]], path: str) -> None:
    """Time and memory against each axis. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('--plot needs matplotlib: pip install -e ".[eval]"') from None
    figure = Figure((4 * len(AXES), 6), layout="constrained")
    axes = figure.subplots(2, len(AXES))
    for column, axis in enumerate(AXES):
        along = [one for one in points if one["axis"] == axis]
        x = [one[axis] for one in along]
        axes[0, column].loglog(x, [one["seconds"] for one in along], "o-")
        axes[1, column].loglog(x, [one["saved_bytes"] / 2**20 for one in along], "o-")
        axes[1, column].set_xlabel(axis)
    axes[0, 0].set_ylabel("forward and backward, s")
    axes[1, 0].set_ylabel("saved for backward, MiB")
    figure.savefig(path, dpi=120)
