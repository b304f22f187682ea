"""Plots a metric, or the held-out loss, of several runs against samples, guidance or capacity."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffmoe.errors import UserError
from diffmoe.evaluation.results import read

# x is None of a result that has none.
AXES: dict[str, tuple[str, Callable[[dict[str, Any]], float | None]]] = {
    "samples": ("training samples seen", lambda result: result["clock"]["samples"]),
    "guidance": ("guidance", lambda result: result.get("images", {}).get("guidance")),
    "capacity": ("capacity C, measured", lambda result: result["capacity_measured"]),
}

# Fields beside the settings: what the images are, not how they were made.
_DESCRIPTIONS = {
    "kind",
    "path",
    "image_shape",
    "uint8",
    "capacity_average",
    "evaluations",
    "shard_size",
    "checkpoint",
    "sha256",
    "thresholds_sha256",
    "shards_sha256",
}
# What results without the field were made with.
_USUAL = {"labels": "balanced", "dtype": "fp32", "calibrated over": "trajectory"}


def metric_name(results: list[dict[str, Any]], metric: str) -> str:
    """The full name of a metric such as FD or FD-EXTRACTOR.

    Raises UserError if there is none, or several: those of different extractors do not compare.
    """
    names = {name for result in results for name in result["metrics"]}
    fitting = sorted(n for n in names if n == metric or n.partition("-")[0] == metric)
    if len(fitting) != 1:
        there = ", ".join(fitting or sorted(names))
        raise UserError(
            f"--metric {metric}: metrics of different extractors cannot be compared; choose one of "
            f"{there}"
            if fitting
            else f"--metric {metric} is not in these results, which have {there}"
        )
    return fitting[0]


def curve_points(
    paths: list[Path], metric: str, axis: str
) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """The metric's full name, and the points (x, y) of each line by its label, sorted by x.

    There is a line for each path and combination of settings; the label tells those in which lines
    differ. Of equal x, the last result counts. Raises UserError for results that do not compare.
    """
    found = {path: read(path) for path in paths}
    name = metric_name([result for results in found.values() for result in results], metric)
    drawn: dict[tuple[Path, tuple[tuple[str, str], ...]], dict[float, float]] = {}
    references = set()
    for path, results in found.items():
        for result in results:
            if result["metrics"].get(name) is None or "clock" not in result:
                continue  # of another metric, not finite, or of images not sampled by us
            x = AXES[axis][1](result)
            if x is None:
                raise UserError(
                    f"{path}: a dense model has no capacity, a loss no guidance; choose another "
                    "--against"
                )
            references.add(_reference(result))
            line = path, tuple(_settings(result, axis).items())
            drawn.setdefault(line, {})[x] = result["metrics"][name]
    if len(references) > 1:
        listed = "; ".join(sorted(references))
        raise UserError(f"metrics against different references cannot be compared: {listed}")
    if not drawn:
        raise UserError(f"no result of a model has {name}; evaluate one first")
    labels = _labels([(path, dict(settings)) for path, settings in drawn])
    lines = zip(labels, drawn.values(), strict=True)
    return name, {label: sorted(points.items()) for label, points in lines}


def plot(paths: list[Path], metric: str, axis: str, out: Path) -> str:
    """Plot `curve_points` to the file `out`. Returns the metric's full name."""
    name, drawn = curve_points(paths, metric, axis)
    draw(drawn, AXES[axis][0], name, out)
    return name


def draw(
    lines: dict[str, list[tuple[float, float]]], x_label: str, y_label: str, out: Path
) -> None:
    """Draw lines of points (x, y), by their labels, to the file `out`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('the plot needs matplotlib: pip install "diffmoe[eval]"') from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def _reference(result: dict[str, Any]) -> str:
    if "held_out" in result:
        of = result["held_out"]
        return f"{of['samples']} samples of {of['shards_sha256'][:12]}, seed {of['seed']}"
    reference = result.get("reference")
    if not reference:
        return "none"
    return f"{reference['path']} ({reference.get('number', '?')} images)"


def _settings(result: dict[str, Any], axis: str) -> dict[str, str]:
    """All that results.jsonl records of how a result was made, but the axis, sorted by name."""
    if "held_out" in result:
        settings = dict(result["held_out"])
    else:
        settings = {**result["images"], "sampler": result["sampler"]}
        calibration = result.get("calibration", {})
        settings |= {f"calibrated {key}": calibration.get(key) for key in ("over", "common")}
    settings |= settings.pop("model")
    if axis != "samples":
        settings["trained on"] = result["clock"]["samples"]
    given = _USUAL | {n: v for n, v in settings.items() if v is not None and v is not False}
    return {name: _text(given[name]) for name in sorted(given.keys() - _DESCRIPTIONS - {axis})}


def _text(value: Any) -> str:
    """A setting's value for a label; of what is long, such as captions, a digest."""
    text = json.dumps(value)
    if len(text) > 24:
        return hashlib.sha256(text.encode()).hexdigest()[:8]
    return text.strip('"')


def _labels(lines: list[tuple[Path, dict[str, str]]]) -> list[str]:
    """Of each line: the folder of its results, and the settings in which some line differs."""
    folders = {path: path.parent if path.suffix else path for path, _ in lines}
    unique = len({folder.name for folder in folders.values()}) == len(folders)
    names = dict.fromkeys(name for _, settings in lines for name in settings)
    differing = [n for n in names if len({settings.get(n) for _, settings in lines}) > 1]
    labels = []
    for path, settings in lines:
        label = folders[path].name if unique else str(path)
        parts = [f"{name} {settings[name]}" for name in differing if name in settings]
        labels.append(f"{label}: {', '.join(parts)}" if parts else label)
    return labels
