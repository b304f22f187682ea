"""The training loop, read top to bottom. One clock, in samples, drives everything periodic."""

import contextlib
import time
from pathlib import Path
from typing import Any

import torch

from diffmoe.clock import Clock
from diffmoe.config import Config
from diffmoe.data.autoencoders import why_missing
from diffmoe.data.fetching import Fetch
from diffmoe.data.lanes import DataSource
from diffmoe.data.manifest import Manifest
from diffmoe.data.stream import LatentStream
from diffmoe.errors import UserError
from diffmoe.parallel.topology import Topology
from diffmoe.training import checkpoint, init_from, summary, watchdog
from diffmoe.training.async_save import Saver
from diffmoe.training.bad_shards import count_bad_shards
from diffmoe.training.due import crossed, due
from diffmoe.training.ema import EMA
from diffmoe.training.health_watch import HealthWatch
from diffmoe.training.lease import Lease, lost_message
from diffmoe.training.live_evaluation import LiveEvaluation
from diffmoe.training.resume import Resume
from diffmoe.training.signals import StopRequest
from diffmoe.training.step import StepResult, TrainingStep, build
from diffmoe.training.telemetry import Telemetry
from diffmoe.training.validation import Metrics, Validation

# Steps in a row without a finite loss and gradient norm before the run gives up.
PATIENCE = 10


def train(
    config: Config,
    topology: Topology,
    device: torch.device,
    ds_settings: dict[str, Any],
    resume: Resume,
    stop: StopRequest,
    lease: Lease,
    telemetry: Telemetry,
) -> bool:
    """Train until the clock reaches training.total_samples. Returns False if asked to stop before.

    resume: from which complete checkpoint, if any. A stop finishes the step, saves, and returns.
    lease: of the output. Raises UserError on every rank once another run has taken it over.
    """
    training, resume_from = config.training, resume.checkpoint

    # State: weights, optimizer, averages, thresholds and clock; new, or from a checkpoint.
    assert config.data.path is not None  # refused by preflight
    manifest = Manifest.load(config.data.path)
    network, engine = build(config, ds_settings, topology, device)
    if training.init and resume_from is None:
        adapted = init_from.load(config, manifest, engine, network)
    ema = EMA(engine, training.ema_decay, training.ema_stds)
    step = TrainingStep(config, network, engine, ema, device)
    if resume_from is not None:
        clock = checkpoint.load(resume_from, engine, network, ema)
        step.samples, step.number, step.skipped = clock.samples, clock.step, clock.skipped
        if not checkpoint.all_finite(engine, ema):
            raise UserError(
                f"{resume_from} holds weights or averages that are not finite; resume an earlier "
                "checkpoint by its PATH"
            )

    # Telemetry, data, and what saves and evaluates.
    telemetry.begin(step.samples, fork=bool(resume.aside))
    telemetry.say(summary.beginning(config, network, device, manifest))
    resumed_at = step.samples
    if resume_from is not None:
        telemetry.say(checkpoint.restored(resume_from, engine, network, ema))
    elif training.init:
        start = f"starts from the weights of {training.init}; clock, optimizer and averages are new"
        telemetry.say("\n  ".join((start, *adapted)))
    missing = why_missing(manifest.autoencoder)
    if missing:
        telemetry.say(
            f"warning: the autoencoder of the data, {manifest.autoencoder}, cannot be opened "
            f"({missing}). Training does not need it; samples and evaluations of this run will, "
            "or --decoder names one then"
        )
    if training.compile:
        telemetry.say("compiling the blocks: the first step takes a minute or more")
    saver = Saver(engine, network, ema, config, manifest, telemetry.say, lease, resume.origin)
    source = DataSource(
        config.data.path,
        manifest,
        lanes=config.data.lanes,
        seed=config.seed,
        fetch=Fetch.of(config.data),
        max_bad_shards=config.data.max_bad_shards,
        features_until=config.align.end,
    )
    data = LatentStream(
        source,
        step.lanes,
        config.samples_per_lane,
        clock=step.samples,
        captions=config.model.text is not None,
        workers=config.data.workers,
        prepare=step.prepare,
        report=telemetry.say if topology.rank == 0 else None,
    )
    stream = iter(data)
    evaluation = None
    if training.evaluate_every:
        evaluation = LiveEvaluation(config, manifest, network, engine, ema, stop, telemetry, lease)
        evaluation.forget_after(step.samples)

    validation = None
    if training.validate_every:
        validation = Validation(config, network, engine, ema)

    if resume.missed:
        what = " and ".join(sorted(resume.missed))
        telemetry.say(f"catching up on what was due at {step.samples} samples: {what}")
    if "ema" in resume.missed:
        saver.begin(clock, "ema")
        saver.wait()
    if "evaluation" in resume.missed:
        assert evaluation is not None
        with watchdog.busy("evaluating"):
            evaluation.run(clock)

    def flags() -> dict[str, float]:
        """What every rank must learn of the others at each step."""
        return {
            "stop": stop.asked,
            "save_failed": saver.failed,
            "lease_lost": lease.lost,
            "bad_shards": len(data.bad_shards),
        }

    skipped_in_a_row, health = 0, HealthWatch()
    result: StepResult | None = None
    while step.samples < training.total_samples:
        # Step.
        watchdog.step_begins(step.number + 1)
        before, after = step.samples, step.samples + training.batch_size
        now_due = due(config, before, after)
        # The held-out loss is part of a line of metrics.
        logging_now = "validation" in now_due or crossed(config.logging.log_samples, before, after)
        waited = time.monotonic()
        examples = next(stream)
        waited = time.monotonic() - waited
        last, result = result, step.run(examples, flags, measure_routing=logging_now)
        asked, save_failed = result.flags["stop"], result.flags["save_failed"]
        if result.flags["lease_lost"]:
            with contextlib.suppress(UserError):  # a save under way fails for the same reason
                saver.wait()
            raise UserError(lost_message(Path(config.output)))
        bad_shards = count_bad_shards(data, result.flags["bad_shards"], device)
        skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0

        # Report.
        if result.skipped:
            telemetry.say(
                f"step {step.number} is skipped ({step.skipped} so far): not finite, loss "
                f"{result.losses['loss']}, gradient norm {result.gradient_norm}"
            )
        if skipped_in_a_row == PATIENCE:
            raise UserError(
                f"{PATIENCE} steps in a row had no finite loss and gradient norm, the last at "
                f"{after} samples with optimizer.learning_rate={result.rates['learning_rate']:g}. "
                f"Look at {Path(config.output) / 'metrics.jsonl'} for when they grew; lower the "
                "learning rate, set optimizer.gradient_clipping, or resume an older checkpoint"
            )
        # The bar shows the step before: looking at this one's loss would wait for the device.
        done = after >= training.total_samples
        shown = last if last is not None and not (logging_now or done) else result
        telemetry.step(after, shown.losses["loss"], shown.gradient_norm)
        held_out: Metrics = {}
        if "validation" in now_due:
            assert validation is not None
            with watchdog.busy("validating"):
                began, held_out = time.monotonic(), validation.run()
            telemetry.validated(held_out, time.monotonic() - began)
        if logging_now and not lease.lost:  # as after a sleep since the step's flags
            for warning in health.warnings(result.routing):
                telemetry.say(warning)
            telemetry.metrics(
                after,
                {
                    "step": step.number,
                    **result.losses,
                    "gradient_norm": result.gradient_norm,
                    **result.rates,
                    "skipped_steps": step.skipped,
                    "bad_shards": bad_shards,
                    "data_wait_seconds": waited,
                    **result.routing,
                    **held_out,
                },
            )

        # Save.
        clock = Clock(samples=after, step=step.number, skipped=step.skipped)
        if asked:
            now_due.add("step")
        kinds = [kind for kind in ("step", "ema") if kind in now_due]
        if kinds:
            saver.begin(clock, *kinds)
        if asked or done or save_failed:
            saver.wait()

        # Stop.
        if asked and not done:
            stopped_by = stop.reason_of_all_ranks()
            break

        # Evaluate.
        if "evaluation" in now_due:
            assert evaluation is not None
            with watchdog.busy("evaluating"):
                evaluation.run(clock)

    telemetry.close()
    engine.destroy()
    if step.samples >= training.total_samples:
        telemetry.say(
            summary.ending(config, manifest.class_names, trained=step.samples > resumed_at)
        )
        return True
    telemetry.say(
        f"stopped by {stopped_by} after step {step.number}, {step.samples} of "
        f"{training.total_samples} samples; the same command resumes from there"
    )
    return False
