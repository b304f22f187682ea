"""What the runs of a study measured, and how variants differ, seed by seed."""

import json
import math
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from diffmoe.capacity.meter import activated_parameters
from diffmoe.comparison.study import Study, StudyRun
from diffmoe.export.tensors import empty_network
from diffmoe.files import read_lines
from diffmoe.planning.flops import forward_flops, newton_schulz_flops, step_flops
from diffmoe.planning.layouts import Layout
from diffmoe.training.history import entries

# Two-sided 95 % quantiles of Student's t by degrees of freedom, from 1; with more than these the
# last one makes the interval a little too wide.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


class Point(NamedTuple):
    """A held-out loss on the way. seconds: of training alone, up to there."""

    samples: int
    seconds: float
    loss: float


class Measured(NamedTuple):
    """A run's held-out losses, oldest first, and what it met on its way.

    capacity: C that the last one met. as_trained: the last one with the routing of training, at its
    C; None where that is the routing of inference.
    """

    curve: list[Point]
    capacity: float
    as_trained: float | None
    step_seconds: float
    figures: dict[str, float]

    @property
    def loss(self) -> float:
        return self.curve[-1].loss


class Size(NamedTuple):
    """What a variant costs: computed, not assumed.

    forward_flops, training_flops: of one sample; of a step's work its share.
    """

    parameters: int
    activated: float
    forward_flops: float
    training_flops: float


class Difference(NamedTuple):
    """Mean over seeds of variant minus reference, and half the width of its 95 % interval.

    Student's t of the paired differences; the interval is infinite with one seed alone.
    """

    mean: float
    half_width: float

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half_width


def measured(run: StudyRun) -> Measured | None:
    """None where the run has not come to its end."""
    seconds, before, curve, speeds, capacity, as_trained = 0.0, 0, [], [], 0.0, None
    for line in entries(run.folder / "metrics.jsonl"):
        seconds += (line["samples"] - before) / line["samples_per_second"]
        before = line["samples"]
        speeds.append(run.config.training.batch_size / line["samples_per_second"])
        if "validation_loss" in line:
            loss = line["validation_loss"]  # null where it was not finite
            curve.append(Point(line["samples"], seconds, math.nan if loss is None else loss))
            capacity = line["validation_capacity"]
            as_trained = line.get("validation_loss_training_routing")
    if not curve or curve[-1].samples < run.config.training.total_samples:
        return None
    return Measured(curve, capacity, as_trained, median(speeds), _figures(evaluations(run)))


def evaluations(run: StudyRun) -> Path:
    """The folder that tools/evaluate.py fills for a run."""
    return run.folder.parent / "evaluation" / run.folder.name


def size(run: StudyRun, capacity: float) -> Size:
    """capacity: C that inference met; the FLOPs are those of training's C."""
    network = empty_network(run.config.model, run.config.moe, device="meta")
    layout = Layout(run.config, 1, 1)
    return Size(
        network.parameter_count(),
        activated_parameters(network, capacity),
        forward_flops(layout) / layout.micro_batch,
        (step_flops(layout) + newton_schulz_flops(layout)) / run.config.training.batch_size,
    )


def difference(ours: list[float], theirs: list[float]) -> Difference:
    """Of values paired by seed."""
    pairs = [one - other for one, other in zip(ours, theirs, strict=True)]
    if len(pairs) == 1:
        return Difference(pairs[0], math.inf)
    t = _T[min(len(pairs) - 2, len(_T) - 1)]
    return Difference(fmean(pairs), t * stdev(pairs) / math.sqrt(len(pairs)))


def reached(curve: list[Point], loss: float) -> Point | None:
    """Where a curve first comes down to a loss, linear between its points, if it does."""
    for before, after in zip([curve[0], *curve], curve, strict=False):
        if after.loss <= loss:
            drop = before.loss - after.loss
            share = (before.loss - loss) / drop if drop > 0 else 1.0
            samples = before.samples + share * (after.samples - before.samples)
            seconds = before.seconds + share * (after.seconds - before.seconds)
            return Point(round(samples), seconds, loss)
    return None


def table(study: Study, found: dict[tuple[str, int], Measured], sizes: dict[str, Size]) -> str:
    """Markdown: a row for each variant, over the seeds that both it and the reference have.

    "as trained": the held-out loss with training's own routing, at exactly its C. "its end at": the
    shares of the reference's samples and seconds that a variant takes to the loss at which the
    reference ends, "-" unless it comes there in every seed. Figures of tools/evaluate.py (FD) are
    followed by their own differences.
    """
    figures = sorted({name for one in found.values() for name in one.figures})
    head = ["variant", "seeds", "held-out loss", f"minus {study.reference}, 95 %"]
    head += [
        "its end at",
        "C met",
        "as trained",
        "parameters",
        "activated",
        "GFLOP a sample",
        "s a step",
        *figures,
    ]
    rows = [head, ["---"] * len(head)]
    for variant in study.variants:
        seeds = [seed for seed in study.seeds if (variant, seed) in found]
        if not seeds:
            rows.append([variant, "0", *["-"] * (len(head) - 2)])
            continue
        mine = [found[variant, seed] for seed in seeds]
        pairs = [
            (found[variant, seed], found[study.reference, seed])
            for seed in seeds
            if variant != study.reference and (study.reference, seed) in found
        ]
        rows.append(
            [
                variant,
                str(len(seeds)),
                f"{fmean(one.loss for one in mine):.5f}",
                *_told(pairs),
                f"{fmean(one.capacity for one in mine):.3f}" if mine[0].capacity else "-",
                _mean([one.as_trained for one in mine]),
                f"{sizes[variant].parameters / 1e6:.2f} M",
                f"{sizes[variant].activated / 1e6:.2f} M",
                f"{sizes[variant].forward_flops / 1e9:.3f}",
                f"{fmean(one.step_seconds for one in mine):.3f}",
                *(_figure(name, mine, pairs) for name in figures),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _told(pairs: list[tuple[Measured, Measured]]) -> tuple[str, str]:
    """The difference of runs and their references, and what it takes to the references' ends."""
    if not pairs:
        return "-", "-"
    told = _difference([(mine.loss, other.loss) for mine, other in pairs], "+.5f", ".5f")
    there = [(reached(mine.curve, other.loss), other.curve[-1]) for mine, other in pairs]
    shares = [(at.samples / end.samples, at.seconds / end.seconds) for at, end in there if at]
    if len(shares) < len(pairs):
        return told, "-"
    samples, seconds = (fmean(column) for column in zip(*shares, strict=True))
    return told, f"{samples:.0%} of samples, {seconds:.0%} of seconds"


def _difference(pairs: list[tuple[float, float]], signed: str, width: str) -> str:
    """Of ours and the reference's by seed, in these formats; a star where it excludes zero."""
    ours, theirs = ([pair[which] for pair in pairs] for which in (0, 1))
    differs, reference = difference(ours, theirs), fmean(theirs)
    share = f"{differs.mean / reference:+.1%}" if reference else "from 0"
    if math.isinf(differs.half_width):
        return f"{differs.mean:{signed}} ({share}, one seed)"
    star = " *" if differs.excludes_zero else ""
    return f"{differs.mean:{signed}} ± {differs.half_width:{width}} ({share}){star}"


def _figure(name: str, mine: list[Measured], pairs: list[tuple[Measured, Measured]]) -> str:
    """Its mean, and what it differs by where both have it."""
    told = _mean([one.figures.get(name) for one in mine])
    both = [
        (ours.figures[name], theirs.figures[name])
        for ours, theirs in pairs
        if name in ours.figures and name in theirs.figures
    ]
    return f"{told}, {_difference(both, '+.3g', '.3g')}" if both else told


def _mean(values: list[float | None]) -> str:
    there = [value for value in values if value is not None]
    return f"{fmean(there):.5g}" if there else "-"


def _figures(folder: Path) -> dict[str, float]:
    """The metrics of the last evaluation of each kind."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("results.jsonl")) if folder.is_dir() else []:
        for line in read_lines(file):
            found |= json.loads(line)["metrics"]
    return found
