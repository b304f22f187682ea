"""Samples of a model for its evaluation: the folder they go to, and the record of the result."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from diffmoe.checkpoints.folder import find_complete, names
from diffmoe.clock import Clock
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.evaluation.scenes import load_truth
from diffmoe.sampling.images import dopri5_note
from diffmoe.sampling.many_images import SampleRequest
from diffmoe.sampling.sampler import Sampler
from diffmoe.text.prompts import Prompts
from diffmoe.work import Ranks


class Sampled(NamedTuple):
    """folder: of the finished samples. about: for the result, beside what is in samples.json.

    clock: of the model's training.
    """

    folder: Path
    about: dict[str, Any]
    clock: Clock


def sample_model(
    sampler: Sampler,
    out: Path,
    request: SampleRequest,
    settings: SamplingSettings,
    *,
    batch: int = 50,
    ranks: Ranks = Ranks(),  # noqa: B008 (a tuple)
    rgb: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Sampled | None:
    """Samples of a model that was opened from a path.

    Their folder, below `out`, is named after the model and everything that determines the images:
    other settings go to another folder, and existing images are not made again. Returns None on all
    ranks but the one that finishes the work. rgb: refuse a model of gray images, before any is
    made. say: gets notes on the settings and the samples.
    """
    model = sampler.model
    if rgb and model.latents.makes_gray:
        raise UserError(
            f"{model.path} makes gray images, and extractors take RGB; leave --reference out and "
            "give --classifier digits, or one of your own"
        )
    settings = sampler.fitted(settings, say)
    folder = out / _folder_name(sampler, request, settings)
    made = sampler.folder(folder, request, settings, batch=batch, ranks=ranks)
    if made is None or not made.closes:
        return None
    about = {
        "model": model.title,
        "clock": model.clock.model_dump(),
        "sampler": settings.chosen_sampler(sampler.config),
        "capacity_measured": made.capacity and made.capacity.average,
        "sampling": {
            "batch": batch,
            "device": str(sampler.network.positions.device),
            "ranks": ranks.world,
        },
    }
    if sampler.choice.calibrated is not None:
        calibrated = sampler.choice.calibrated
        about["calibration"] = calibrated.model_dump(mode="json", exclude={"log_odds"})
        note = sampler.calibration_note(settings, made.capacity)
        if note:
            say(note)
    if "evaluations" in made.manifest:
        say(dopri5_note(made.manifest["evaluations"]))
    return Sampled(folder, about, model.clock)


def _folder_name(sampler: Sampler, request: SampleRequest, settings: SamplingSettings) -> str:
    plan: list[Any] = [request.number, sampler.identity(), vars(settings)]
    if sampler.prompts is not None:
        plan += [sampler.prompts.captions, sampler.prompts.negative]
    if request.labels != "balanced":
        plan.append(request.labels)
    if sampler.dtype != "fp32":
        plan.append(sampler.dtype)
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    return f"{sampler.model.path.name}-{digest[:12]}"


def check_judges(
    prompts: Prompts | None,
    classifier: str | None = None,
    truth: str | None = None,
    clip: str | None = None,
) -> None:
    """Raise UserError where a judge of images does not fit the model: classes or captions."""
    if prompts is not None and classifier:
        raise UserError(
            f"classifier {classifier} judges classes, and the model takes captions: judge by a "
            "reference, or by the captions"
        )
    for name, judge in (("truth", truth), ("clip", clip)):
        if prompts is None and judge:
            raise UserError(f"{name} {judge} judges captions, and the model takes classes")
    if truth and prompts is not None:
        unknown = sorted(set(prompts.captions) - load_truth(truth).keys())
        if unknown:
            raise UserError(f"truth {truth} does not contain {unknown[0]!r}, which is requested")


def snapshots(run: Path) -> list[Path]:
    """A run's averages, oldest first: of each step the ema-* folder, or else the checkpoint."""
    by_step = {name.partition("-")[2]: run / name for name in names(run)}
    by_step |= {name.partition("-")[2]: run / name for name in names(run, "ema")}
    if not by_step:
        raise UserError(f"{run} holds no snapshots ema-* or step-*; give a run's folder")
    return [find_complete(by_step[step]) for step in sorted(by_step)]
