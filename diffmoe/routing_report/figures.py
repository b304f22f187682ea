"""Figures of what the experts do, as Fig. 1c, 12, 13 and 14 of the paper, as PNG."""

import io
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.routing_report.analysis import PredictorAccuracy, SamplingRouting

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure
except ImportError:
    raise UserError('figures need matplotlib: pip install "diffmoe[demo]"') from None

COLORMAP = "viridis"


def png(figure: Figure) -> bytes:
    """The figure's PNG; closes it."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return stream.getvalue()


def picture(figure: Figure) -> Image.Image:
    return Image.open(io.BytesIO(png(figure)))


def compute_map(routing: SamplingRouting, sample: int) -> Figure:
    """How many experts worked on each token of a sample."""
    figure, axes = plt.subplots(figsize=(3.4, 2.8))
    shown = axes.imshow(routing.compute[sample].view(routing.grid), vmin=0, cmap=COLORMAP)
    axes.axis("off")
    figure.colorbar(shown, ax=axes)
    return figure


def capacity_by_time(routing: SamplingRouting) -> Figure:
    """C of the whole pass from noise to data (Fig. 1c), and each layer's."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    times = routing.capacity.times
    for layer, values in enumerate(routing.capacity.capacity.mean(2).t()):
        axes.plot(times, values, linewidth=1, alpha=0.6, label=f"MoE layer {layer}")
    axes.plot(times, routing.capacity.by_time, color="black", linewidth=2.5, label="all")
    axes.axhline(1, color="gray", linestyle=":", linewidth=1)
    axes.set(xlabel="time, from noise (0) to data (1)", ylabel="capacity C", ylim=(0, None))
    axes.legend(fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def capacity_by_expert(routing: SamplingRouting) -> Figure:
    """C of each layer's experts (rows) over time (Fig. 12)."""
    capacity = routing.capacity.capacity.permute(1, 2, 0)  # (L, E, times)
    figure, axes = _panels(len(capacity), width=2.6, height=2.2)
    top = float(capacity.max())
    for layer, axis in enumerate(axes):
        image = axis.imshow(
            capacity[layer],
            aspect="auto",
            vmin=0,
            vmax=top,
            cmap=COLORMAP,
            extent=(0, 1, capacity.shape[1] - 0.5, -0.5),
        )
        axis.set_title(f"MoE layer {layer}", fontsize=9)
        axis.set(xlabel="time", ylabel="expert")
    figure.colorbar(image, ax=axes, label="capacity C", shrink=0.8)
    return figure


def unselected(routing: SamplingRouting) -> Figure:
    """Share of tokens that no expert takes, by layer over time."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for layer, values in enumerate(routing.unselected.t()):
        axes.plot(routing.capacity.times, values, label=f"MoE layer {layer}")
    axes.set(xlabel="time, from noise (0) to data (1)", ylabel="share of tokens", ylim=(0, 1))
    axes.legend(fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def classes(
    routing: SamplingRouting, chosen: list[tuple[int, float]], name: Callable[[int], str]
) -> Figure:
    """Classes with their C, two samples of each and the compute on each token (Fig. 13, 14)."""
    figure, axes = plt.subplots(4, len(chosen), figsize=(1.25 * len(chosen), 5.4), squeeze=False)
    top = float(routing.compute.max())
    for column, (label, mean) in enumerate(chosen):
        mine = (routing.labels == label).nonzero().flatten()[:2]
        for axis in axes[:, column]:
            axis.axis("off")
        for row, sample in enumerate(mine.tolist()):
            _show(axes[2 * row, column], routing.images[sample])
            compute = routing.compute[sample].view(routing.grid)
            axes[2 * row + 1, column].imshow(compute, vmin=0, vmax=top, cmap=COLORMAP)
        axes[0, column].set_title(f"{name(label)[:14]}\nC {mean:.2f}", fontsize=8, parse_math=False)
    return figure


def places(routing: SamplingRouting) -> Figure:
    """Where in the image each expert works: a row of experts for each layer."""
    L, E, _ = routing.places.shape
    figure, axes = plt.subplots(L, E, figsize=(0.75 * E + 1, 0.8 * L + 0.4), squeeze=False)
    top = float(routing.places.max())
    for layer in range(L):
        for expert in range(E):
            axis = axes[layer, expert]
            image = axis.imshow(
                routing.places[layer, expert].view(routing.grid), vmin=0, vmax=top, cmap=COLORMAP
            )
            axis.set(xticks=[], yticks=[])
            if layer == 0:
                axis.set_title(f"{expert}", fontsize=8)
        axes[layer, 0].set_ylabel(f"layer {layer}", fontsize=8)
    figure.suptitle("expert", fontsize=9, y=0.99)
    figure.colorbar(image, ax=axes, label="share of samples", shrink=0.8)
    return figure


def overlap(routing: SamplingRouting) -> Figure:
    """Of the tokens that expert i (row) takes, the share that j (column) takes too."""
    figure, axes = _panels(len(routing.overlap), width=2.4, height=2.2)
    for layer, axis in enumerate(axes):
        image = axis.imshow(routing.overlap[layer], vmin=0, vmax=1, cmap=COLORMAP)
        axis.set_title(f"MoE layer {layer}", fontsize=9)
        axis.set(xlabel="expert j", ylabel="expert i")
    figure.colorbar(image, ax=axes, label="share of i's tokens that j takes", shrink=0.8)
    return figure


def calibration_curve(accuracy: PredictorAccuracy) -> Figure:
    """Predicted probability against the selected share, and how often each is predicted."""
    figure, (curve, counts) = plt.subplots(
        2, 1, figsize=(4.4, 5), height_ratios=(3, 1), sharex=True
    )
    filled = accuracy.counts > 0
    curve.plot([0, 1], [0, 1], color="gray", linestyle=":")
    curve.plot(accuracy.predicted[filled], accuracy.selected[filled], marker="o", markersize=4)
    curve.set(ylabel="share selected in training", xlim=(0, 1), ylim=(0, 1))
    bins = len(accuracy.counts)
    counts.bar((torch.arange(bins) + 0.5) / bins, accuracy.counts, width=1 / bins)
    counts.set(xlabel="predicted probability", ylabel="pairs", yscale="log")
    return figure


def precision_and_recall(accuracy: PredictorAccuracy) -> Figure:
    figure, axes = plt.subplots(figsize=(5, 3))
    layers = torch.arange(len(accuracy.precision))
    axes.bar(layers - 0.2, accuracy.precision, width=0.4, label="precision")
    axes.bar(layers + 0.2, accuracy.recall, width=0.4, label="recall")
    axes.set(xlabel="MoE layer", ylim=(0, 1), xticks=layers)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _panels(n: int, width: float, height: float) -> tuple[Figure, list]:
    """n axes, at most six in a row."""
    columns = min(n, 6)
    rows = -(-n // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns + 1, height * rows),
        squeeze=False,
        layout="constrained",
    )
    flat = list(axes.flat)
    for axis in flat[n:]:
        axis.axis("off")
    return figure, flat[:n]


def _show(axis, image: Tensor) -> None:
    axis.imshow(image.squeeze(-1).numpy(), cmap="gray" if image.shape[-1] == 1 else None)
