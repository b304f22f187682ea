"""A study's table and curves, written into its folder."""

from pathlib import Path

from diffmoe.comparison.measured import Measured, Size, measured, size, table
from diffmoe.comparison.study import Study, StudyRun
from diffmoe.errors import UserError
from diffmoe.files import write_json


def write_report(study: Study, runs: list[StudyRun]) -> str:
    """table.md, table.json and, with matplotlib, curves.png. Returns the table.

    Raises UserError where no run has come to its end.
    """
    found = {(run.variant, run.seed): one for run in runs if (one := measured(run)) is not None}
    if not found:
        raise UserError(f"{study.output} holds no finished run; leave --report out to train them")
    first = {run.variant: run for run in reversed(runs)}
    capacity = {variant: one.capacity for (variant, _), one in found.items()}
    sizes = {name: size(first[name], met) for name, met in capacity.items()}
    told = table(study, found, sizes)
    out = Path(study.output)
    (out / "table.md").write_text(told + "\n")
    write_json(
        out / "table.json",
        {
            "study": study.model_dump(),
            "runs": [
                {"variant": variant, "seed": seed, **one._asdict(), **sizes[variant]._asdict()}
                for (variant, seed), one in found.items()
            ],
        },
    )
    _draw(study, found, sizes, out / "curves.png")
    return told


def _draw(
    study: Study,
    found: dict[tuple[str, int], Measured],
    sizes: dict[str, Size],
    file: Path,
) -> None:
    """Held-out loss against samples, FLOPs and seconds: a line a seed, a color a variant."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # the table says it all
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    labels = ("training samples", "training FLOPs", "training seconds")
    for axes, label in zip(panels, labels, strict=True):
        axes.set(xlabel=label, yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss")
    for number, variant in enumerate(study.variants):
        seeds = [seed for seed in study.seeds if (variant, seed) in found]
        for seed in seeds:
            curve = found[variant, seed].curve
            columns = (
                [point.samples for point in curve],
                [point.samples * sizes[variant].training_flops for point in curve],
                [point.seconds for point in curve],
            )
            for axes, x in zip(panels, columns, strict=True):
                axes.plot(
                    x,
                    [point.loss for point in curve],
                    color=f"C{number % 10}",
                    linestyle="-" if number < 10 else "--",
                    label=variant if seed == seeds[0] else None,
                )
    panels[2].legend(fontsize="small")
    figure.savefig(file, dpi=120)
