"""The held-out loss of a model on disk, measured at any time after its training.

With the validation, seed and precision of its run it is, to rounding, what training wrote into
metrics.jsonl at that checkpoint.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffmoe.checkpoints.checksums import wrong_sizes
from diffmoe.checkpoints.folder import checkpoints_of, step_of
from diffmoe.checkpoints.run_file import read_run_file
from diffmoe.config import Config
from diffmoe.data import manifest as data_manifest
from diffmoe.data.fetching import Fetch, check_addresses
from diffmoe.data.manifest import Manifest
from diffmoe.errors import UserError
from diffmoe.evaluation import curves, held_out, results
from diffmoe.evaluation.held_out import HeldOut, HeldOutLoss, check_untrained
from diffmoe.export.exported_model import is_exported
from diffmoe.files import does_not_exist
from diffmoe.sampling.sampler import Sampler

METRIC = "validation_loss"
HEAD = f"{'samples':>12}  {METRIC:>15}  {'C':>6}"


def measure_once(
    sampler: Sampler, config: Config, file: Path, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The result that `file`, a results.jsonl, holds of this; else measured now and added to it.

    sampler: opened from a path; it says how the network routes. config: the sampler's, but with the
    validation, seed and training.precision to measure with; the network's parameters are cast to
    the latter. say: is told of a result that was there.

    Raises UserError, before the network computes, where there is no validation.path, its data do
    not fit the model or hold fewer samples, or a shard of it was trained on.
    """
    path, model = config.validation.path, sampler.model
    if path is None or not Path(path).is_dir():
        told = f"={path} is not a folder"
        if path is not None and not Path(path).exists():
            told = f": {does_not_exist(path)}"
        raise UserError(
            f"{model.path}: validation.path{told}; give --data, shards of samples that were not "
            "trained on"
        )
    manifest = Manifest.load(path)
    check_addresses(path, manifest, Fetch.of(config.data))
    warned = _check_latents(sampler, path, manifest) + _check_untrained(sampler, path, manifest)
    settings = {
        "samples": config.validation.samples,
        "seed": config.seed,
        "precision": config.training.precision,
        "batch": held_out.BATCH,
        "shards_sha256": manifest.shards_sha256,
        "model": sampler.identity(),
    }
    for result in results.read(file) if file.exists() else []:
        if result.get("held_out") == settings:
            say(f"{model.title} was measured before, see {file}")
            return result
    began = time.monotonic()
    found = _measured(sampler, config, path)
    result = {
        "metrics": {METRIC: _finite(found.loss)},
        "warnings": warned,
        "by_time": [_finite(loss) for loss in found.by_time],
        "capacity_measured": None if config.moe.type == "dense" else found.capacity,
        "model": model.title,
        "clock": model.clock.model_dump(),
        "held_out": settings,
        "data": path,
        "device": str(sampler.network.positions.device),
        "seconds": round(time.monotonic() - began, 3),
        **results.circumstances(),
    }
    results.append(file, result)
    return result


def _measured(sampler: Sampler, config: Config, path: str) -> HeldOutLoss:
    of = HeldOut(config, path, config.validation.samples)
    if config.training.precision == "bf16":  # computes as it did in training
        sampler.network.to_bf16()
    with sampler.routed():
        return of.summary(of.measure(sampler.network))


def _check_latents(sampler: Sampler, path: str, manifest: Manifest) -> list[str]:
    """Raise UserError for another shape. Returns warnings."""
    ours, theirs = sampler.model.latents, manifest.latent_spec
    if ours.shape != theirs.shape:
        shapes = ["x".join(map(str, spec.shape)) for spec in (theirs, ours)]
        raise UserError(
            f"{path} holds latents of shape {shapes[0]}, {sampler.model.path} takes {shapes[1]}; "
            "give --data, shards of the same latents"
        )
    return [
        f"{name} of the latents is {getattr(theirs, name)} in {path}, {getattr(ours, name)} in the "
        "model"
        for name in ("scale", "shift")
        if getattr(ours, name) != getattr(theirs, name)
    ]


def _check_untrained(sampler: Sampler, path: str, manifest: Manifest) -> list[str]:
    """Raise UserError for data that was trained on. Returns a warning where nobody can tell."""
    model, trained = sampler.model.path, sampler.config.data.path
    if not is_exported(model) and read_run_file(model).shards_sha256 == manifest.shards_sha256:
        raise UserError(f"{path} holds the data that {model} was trained on; give other --data")
    if trained is None or not (Path(trained) / data_manifest.FILE_NAME).exists():
        return [f"not checked that {path} was not trained on: the model's training data is missing"]
    check_untrained(path, manifest, trained, Manifest.load(trained))
    return []


def _finite(value: float) -> float | None:
    """As JSON has it, which knows no NaN: null, as in metrics.jsonl."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def stored(
    run: Path, weights: str, say: Callable[[str], None] = lambda text: None
) -> Iterator[Path]:
    """What a run still has, oldest first: of each step the checkpoint, or else its ema-* folder.

    The latter may be in bf16, and has no live weights. What is not complete when its turn comes (a
    run under way removes old ones) is reported to `say` and skipped. Raises UserError where there
    is nothing.
    """
    by_step: dict[int, list[Path]] = {}
    for path in reversed(checkpoints_of(run)):  # checkpoints first
        if weights == "ema" or path.name.startswith("step-"):
            by_step.setdefault(step_of(path.name), []).append(path)
    any_complete = False
    for step in sorted(by_step):
        for path in by_step[step]:
            problems = wrong_sizes(path)
            if not problems:
                any_complete = True
                yield path
                break
            say(f"warning: {path} is skipped: {problems[0]}")
    if not any_complete:
        raise UserError(f"{run} holds no complete checkpoint with {weights} weights")


def plot(found: list[dict[str, Any]], label: str, out: Path) -> None:
    """Draw the losses of one model's training against its samples. Raises UserError."""
    points = [(result["clock"]["samples"], _number(result["metrics"][METRIC])) for result in found]
    curves.draw({label: points}, curves.AXES["samples"][0], METRIC, out)


def row(result: dict[str, Any]) -> str:
    """A result as a line below HEAD."""
    loss, capacity = result["metrics"][METRIC], result["capacity_measured"]
    told = "not finite" if loss is None else f"{loss:.6f}"
    met = "-" if capacity is None else f"{capacity:.3f}"
    return f"{result['clock']['samples']:>12}  {told:>15}  {met:>6}"


def details(result: dict[str, Any]) -> str:
    """The loss by time as text, what it was measured on, and warnings."""
    of, model = result["held_out"], result["held_out"]["model"]
    routing = f", routing {model['routing']}" if model["routing"] else ""
    by_time = ("-" if loss is None else f"{loss:.4f}" for loss in result["by_time"])
    lines = [
        f"by tenths of the time, from noise to data: {' '.join(by_time)}",
        f"of {of['samples']} samples of {result['data']}, seed {of['seed']}: {result['model']}, "
        f"{model['weights']} weights{routing}, {of['precision']}",
    ]
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])])
