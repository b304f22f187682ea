"""How the layer's time and memory grow with experts, tokens, width, and ranks that share them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffmoe.benchmarks.layer import mixture_of, saved_bytes, work_of
from diffmoe.benchmarks.memory import peak_growth
from diffmoe.benchmarks.ranks import forget_groups, on_ranks, rank_device
from diffmoe.benchmarks.report import Report
from diffmoe.benchmarks.timing import take_turns
from diffmoe.config import Config
from diffmoe.models.families.diffmoe import DiffMoE
from diffmoe.parallel.topology import Topology, create_topology

AXES = ("E", "S", "D", "P")
WORLD = 4  # ranks of one thread each, along P


def sweeps(config: Config) -> dict[str, list[int]]:
    """The values along each axis; the others stay at E = 16, S = 2048, the recipe's D, P = 1."""
    width = config.model.width
    return {
        "E": [4, 8, 16, 32, 64],
        "S": [1024, 4096, 16384, 65536],
        "D": [width // 2, width, 2 * width],
        "P": [1, 2, 4],
    }


def benchmark_growth(
    config: Config, largest: int, rounds: int, device: torch.device, report: Report
) -> None:
    """One axis after the other; largest: most tokens of a point.

    The report gets the points, and the slopes on logarithmic axes (1: linear).
    """
    usual = {"E": 16, "S": min(2048, largest), "D": config.model.width}
    for axis, values in sweeps(config).items():
        if axis == "P":
            along = on_ranks(WORLD, _points_of_ranks, config, usual, values, rounds)
        else:
            shapes = [usual | {axis: value} for value in values]
            shapes = [shape for shape in shapes if shape["S"] <= largest]
            along = [{"axis": axis} | _point(config, shape, rounds, device) for shape in shapes]
        for quantity in ("seconds", "saved_bytes", "weight_bytes", "peak_bytes"):
            known = [(one[axis], one[quantity]) for one in along if one[quantity]]
            if len(known) > 1:
                x, y = np.log(np.array(known, float)).T
                slope = float(np.polyfit(x, y, 1)[0])
                report.add(f"{quantity} against {axis}, slope on log axes", slope, "")
        report.points.extend(along)


def _points_of_ranks(
    config: Config, shape: dict[str, int], values: list[int], rounds: int
) -> list[dict[str, Any]]:
    """shape: of the tokens of every rank; P experts' owners send them to each other."""
    points = []
    for value in values:
        topology = create_topology(value)
        points.append(
            {"axis": "P", "P": value} | _point(config, shape, rounds, rank_device(), topology)
        )
        forget_groups()
    return points


def _point(
    config: Config,
    shape: dict[str, int],
    rounds: int,
    device: torch.device,
    topology: Topology = Topology(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    # The layer has no heads; the configuration wants some that divide the width.
    changes = {"model.width": shape["D"], "model.heads": 1, "moe.experts": shape["E"]}
    candidate = mixture_of(config.replace(changes), DiffMoE, device, topology)
    parameters = list(candidate.module.parameters())
    tokens = torch.randn(1, shape["S"], shape["D"], dtype=parameters[0].dtype, device=device)
    tokens.requires_grad_()
    work = work_of(candidate, tokens)
    return {
        **shape,
        "device": device.type,
        "seconds": take_turns({"layer": work}, rounds, device).median("layer"),
        "saved_bytes": saved_bytes(candidate, tokens),
        "weight_bytes": sum(one.nbytes for one in parameters),
        "peak_bytes": peak_growth(work, device),
    }


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against each axis."""
    from matplotlib.figure import Figure  # of the extra `eval`

    quantities = {
        "seconds": ("forward and backward, s", 1),
        "saved_bytes": ("saved for backward, MiB", 2**20),
        "weight_bytes": ("weights of a rank, MiB", 2**20),
    }
    drawn = [axis for axis in AXES if any(one["axis"] == axis for one in points)]
    figure = Figure((4 * len(drawn), 9), layout="constrained")
    axes = figure.subplots(len(quantities), len(drawn))
    for column, axis in enumerate(drawn):
        along = [one for one in points if one["axis"] == axis]
        x = [one[axis] for one in along]
        for row, (quantity, (label, unit)) in enumerate(quantities.items()):
            y = [one[quantity] / unit for one in along]
            part = axes[row, column]
            part.loglog(x, y, "o-")
            part.set_xticks(x, map(str, x))
            part.minorticks_off()
            part.set_ylim(min(y) / 4, max(y) * 4)  # so that what hardly grows looks flat
            axes[row, 0].set_ylabel(label)
        axes[-1, column].set_xlabel(axis)
    figure.savefig(path, dpi=120)
