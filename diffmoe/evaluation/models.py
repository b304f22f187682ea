"""A model's samples, made for their evaluation: the folder, and what to say of them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from diffmoe.capacity.thresholds import set_capacity
from diffmoe.checkpoints.folder import find_complete, names
from diffmoe.clock import Clock
from diffmoe.config import Config
from diffmoe.data.autoencoders import autoencoder_of
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.evaluation.scenes import load_truth
from diffmoe.export.open import open_network, weights_of
from diffmoe.parallel.topology import Topology
from diffmoe.sampling.images import EvaluationCount
from diffmoe.sampling.latents import fitted
from diffmoe.sampling.many_images import SampleRequest, generate, identity
from diffmoe.text.prompts import Prompts
from diffmoe.work import Ranks


class Sampled(NamedTuple):
    """folder: of the finished samples. about: for the result, beside what samples.json tells.
    clock: of the model's training.
    """

    folder: Path
    about: dict[str, Any]
    clock: Clock


def sample_model(
    model: Path,
    out: Path,
    number: int,
    settings: SamplingSettings,
    *,
    weights: str = "ema",
    routing: str | None = None,
    capacity: float | None = None,
    labels: str = "balanced",
    batch: int = 50,
    device: str = "cpu",
    ranks: Ranks = Ranks(),  # noqa: B008 (a tuple)
    topology: Topology | None = None,
    rgb: bool = False,
    prompts_for: Callable[[Config], Prompts | None] = lambda config: None,
    say: Callable[[str], None] = lambda text: None,
) -> Sampled | None:
    """Samples of a located checkpoint or converted model, of all classes or prompts.

    The folder, below `out`, is named for the checkpoint and all that decides the images: other
    settings go to another one, and what is there already is not made again. Returns None on all
    ranks but the one that closes the work. rgb: a model of gray images is refused, before any is
    made. labels: "balanced" takes classes or prompts in turn, "random" draws one for each image.
    prompts_for: what a text model of a configuration is asked for. say: is told what was decided
    and found beside the samples.
    """
    weights = weights_of(model, weights)
    snapshot = open_network(model, weights, topology, device)
    network, config = snapshot.network, snapshot.config
    if rgb and snapshot.latents.makes_gray:
        raise UserError(
            f"{model} makes gray images, and extractors take RGB; leave --reference out and give "
            "--classifier digits, or one of your own"
        )
    calibrated = set_capacity(network, model, routing, capacity, weights)
    identified = identity(model, network, weights, capacity)
    prompts = prompts_for(config)
    settings = fitted(settings, config, prompts, say)
    plan = [number, identified, vars(settings)]
    if prompts is not None:
        plan += [prompts.captions, prompts.negative]
    if labels != "balanced":
        plan.append(labels)
    plan = json.dumps(plan, sort_keys=True)
    folder = out / f"{model.name}-{hashlib.sha256(plan.encode()).hexdigest()[:12]}"
    made = generate(
        folder,
        network,
        config,
        autoencoder_of(snapshot.latents, device).decode,
        SampleRequest(
            number, tuple(range(len(prompts) if prompts else config.model.num_classes)), labels
        ),
        settings,
        model=identified,
        prompts=prompts,
        batch=batch,
        ranks=ranks,
    )
    if made is None or not made.closes:
        return None
    about = {
        "model": str(model),
        "clock": snapshot.clock.model_dump(),
        "sampler": settings.chosen_sampler(config),
        "capacity_measured": made.capacity and made.capacity.average,
        "sampling": {"batch": batch, "device": str(device), "ranks": ranks.world},
    }
    if calibrated is not None:
        about["calibration"] = calibrated.model_dump(mode="json", exclude={"log_odds"})
        differing = calibrated.differs(settings, config, made.capacity.average)
        if differing:
            say(differing)
    if "evaluations" in made.manifest:
        say(EvaluationCount.told(made.manifest["evaluations"]))
    return Sampled(folder, about, snapshot.clock)


def check_judges(
    prompts: Prompts | None,
    classifier: str | None = None,
    truth: str | None = None,
    clip: str | None = None,
) -> None:
    """Raise UserError where what judges images does not fit what the model is asked for."""
    if prompts is not None and classifier:
        raise UserError(
            f"classifier {classifier} judges classes, and the model takes captions: judge by a "
            "reference, or by the captions"
        )
    for name, judge in (("truth", truth), ("clip", clip)):
        if prompts is None and judge:
            raise UserError(f"{name} {judge} judges captions, and the model takes classes")
    if truth:
        unknown = sorted(set(prompts.captions) - load_truth(truth).keys())
        if unknown:
            raise UserError(f"truth {truth} does not tell of {unknown[0]!r}, which is asked for")


def snapshots(run: Path) -> list[Path]:
    """A run's averages, oldest first: of each step its ema-* folder, or else its checkpoint."""
    by_step = {name.partition("-")[2]: run / name for name in names(run)}
    by_step |= {name.partition("-")[2]: run / name for name in names(run, "ema")}
    if not by_step:
        raise UserError(f"{run} holds no snapshots ema-* or step-*; give a run's folder")
    return [find_complete(by_step[step]) for step in sorted(by_step)]
