"""What is due when the clock has moved, and what of it a kill prevented."""

from pathlib import Path

from diffmoe.checkpoints.checksums import wrong_sizes
from diffmoe.checkpoints.run_file import read_run_file
from diffmoe.config import Config
from diffmoe.evaluation.results import FILE_NAME
from diffmoe.training.history import entries

EVALUATION = "evaluation"  # in a run's folder, the results and pictures of live evaluations


def crossed(period: int, before: int, after: int) -> bool:
    """Whether a multiple of `period` lies in (before, after]."""
    return after // period > before // period


def due(config: Config, before: int, after: int) -> set[str]:
    """Of step, ema, evaluation and validation, what is due at a step from clock to clock."""
    training = config.training
    done = after >= training.total_samples
    found = set()
    if done or crossed(training.checkpoint_samples, before, after):
        found.add("step")
    if training.snapshot_samples and crossed(training.snapshot_samples, before, after):
        found.add("ema")
    if training.evaluate_every and (done or crossed(training.evaluate_every, before, after)):
        found.add("evaluation")
    if training.validate_every and (done or crossed(training.validate_every, before, after)):
        found.add("validation")
    return found


def missed(config: Config, checkpoint: Path) -> set[str]:
    """Of ema and evaluation, what was due at the clock of this run's checkpoint and is not there.

    The checkpoint is saved first, so a kill may come in between. The held-out loss is measured
    before.
    """
    record, run = read_run_file(checkpoint), Path(config.output)
    clock, batch = record.clock, record.settings.training.batch_size
    missing = due(config, clock.samples - batch, clock.samples) - {"step", "validation"}
    if not wrong_sizes(run / f"ema-{clock.step:08d}"):
        missing.discard("ema")
    if _evaluated(run, clock.samples):
        missing.discard("evaluation")
    return missing


def _evaluated(run: Path, samples: int) -> bool:
    return any(clock_of_live(result) == samples for result in entries(run / EVALUATION / FILE_NAME))


def clock_of_live(result: dict) -> int | None:
    """Of a live evaluation's result, its clock in samples; None for any other."""
    try:
        return result["clock"]["samples"] if result["images"]["kind"] == "training" else None
    except (TypeError, KeyError):
        return None
