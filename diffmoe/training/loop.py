"""The training loop, top to bottom. One clock, in samples, drives all that repeats."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe.config import Config, OptimizerConfig
from diffmoe.data.examples import micro_batches
from diffmoe.data.fetching import Fetch
from diffmoe.data.lanes import DataSource
from diffmoe.data.manifest import Manifest
from diffmoe.data.stream import LatentStream
from diffmoe.diffusion import create_objective
from diffmoe.errors import UserError
from diffmoe.parallel.topology import Topology
from diffmoe.training import checkpoint, init_from, watchdog
from diffmoe.training.async_save import Saver
from diffmoe.training.due import crossed, due
from diffmoe.training.ema import EMA
from diffmoe.training.lease import Lease, lost_message
from diffmoe.training.live_evaluation import LiveEvaluation
from diffmoe.training.resume import Resume
from diffmoe.training.routing_metrics import RoutingMetrics
from diffmoe.training.signals import StopRequest
from diffmoe.training.step import build, losses_of
from diffmoe.training.telemetry import Telemetry
from diffmoe.training.thresholds import ThresholdTracker
from diffmoe.tree import tree_map

# Steps in a row without a finite loss and gradient norm before the run gives up.
PATIENCE = 10


def learning_rate(optimizer: OptimizerConfig, samples: int, total_samples: int) -> float:
    """The rate at a clock: linear warm-up, then constant or a half cosine down to zero."""
    rate = optimizer.learning_rate
    if samples < optimizer.warmup_samples:
        return rate * samples / optimizer.warmup_samples
    if optimizer.schedule == "cosine":
        span = max(1, total_samples - optimizer.warmup_samples)
        # The last batch may reach past the end.
        done = min(1.0, (samples - optimizer.warmup_samples) / span)
        rate *= 0.5 * (1 + math.cos(math.pi * done))
    return rate


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
    first_rank = topology.rank == 0
    folder = Path(config.output)

    manifest = Manifest.load(config.data.path)
    manifest.check(config.data.path, config.data.lanes, config.data.max_bad_shards)
    manifest.check_model(config.model)
    lanes_per_rank = config.data.lanes // topology.world
    my_lanes = range(topology.rank * lanes_per_rank, (topology.rank + 1) * lanes_per_rank)

    objective = create_objective(config.diffusion)
    network, engine = build(config, ds_settings, topology, device)
    if training.init and resume_from is None:
        init_from.load(Path(training.init), engine, network)
    ema = EMA(engine, training.ema_decay, training.ema_stds)
    thresholds = ThresholdTracker(network)

    samples, step, skipped, skipped_in_a_row = 0, 0, 0, 0
    if resume_from is not None:
        clock = checkpoint.load(resume_from, engine, network, ema)
        samples, step, skipped = clock["samples"], clock["step"], clock["skipped"]
        if not checkpoint.all_finite(ema):
            raise UserError(
                f"{resume_from} holds weights or averages that are not finite; resume an earlier "
                "checkpoint by its PATH"
            )

    telemetry.begin(samples, fork=bool(resume.aside))
    if resume_from is not None:
        state = checkpoint.pieces(engine, network, ema)
        telemetry.say(checkpoint.restored(resume_from, network, state))
    elif training.init:
        telemetry.say(f"starts from the weights of {training.init}")
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
    )
    data = LatentStream(
        source,
        my_lanes,
        config.samples_per_lane,
        clock=samples,
        captions=config.model.text is not None,
        workers=config.data.workers,
        report=telemetry.say if first_rank else None,
    )
    stream = iter(data)
    evaluation = None
    if training.evaluate_every:
        evaluation = LiveEvaluation(
            config, manifest, network, engine, ema, device, stop, telemetry, lease
        )
        evaluation.forget_after(samples)

    if resume.missed:
        what = " and ".join(sorted(resume.missed))
        telemetry.say(f"catching up on what was due at {samples} samples: {what}")
    if "ema" in resume.missed:
        saver.begin(clock, "ema")
        saver.wait()
    if "evaluation" in resume.missed:
        with watchdog.busy("evaluating"):
            evaluation.run(clock)

    while samples < training.total_samples:
        watchdog.step_begins(step + 1)
        before, samples = samples, samples + training.batch_size
        logging_now = crossed(config.logging.log_samples, before, samples)
        report = RoutingMetrics(network) if logging_now else None

        waited = time.monotonic()
        batch = next(stream)
        waited = time.monotonic() - waited

        rate = learning_rate(config.optimizer, samples, training.total_samples)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate

        losses: dict[str, Tensor] = {}
        for examples in micro_batches(batch, config, my_lanes, before, objective):
            examples = tree_map(lambda tensor: tensor.to(device), examples)
            loss, parts, routing = losses_of(engine, objective, examples, config)
            # A loss can overflow while its gradient is finite. NaN makes all gradients NaN, so that
            # the engine skips the step on every rank.
            engine.backward(loss * torch.where(loss.isfinite(), 1.0, torch.nan))
            engine.step()  # acts at the last micro-batch only

            thresholds.observe(routing)
            if report is not None:
                report.observe(routing)
            for name, part in parts.items():
                part = part.detach().double() / training.accumulation
                losses[name] = losses[name] + part if name in losses else part

        # One collective tells every rank the mean losses, whether any was asked to stop, whether
        # a save has failed or the output was taken over, how many shards all of them could not
        # read, and how routing went.
        flags = [stop.asked, saver.failed, lease.lost, len(data.bad_shards)]
        kth_LE = thresholds.seen()
        told = [
            torch.stack(list(losses.values())),
            torch.tensor(flags, dtype=torch.double),
            kth_LE.flatten(),
            report.flat() if report is not None else torch.empty(0),
        ]
        summed = torch.cat([part.to(device, torch.double) for part in told])
        dist.all_reduce(summed)
        means, flags, kth, routed = summed.split([len(part) for part in told])
        kth_LE = (kth / topology.world).to(kth_LE.dtype).view_as(kth_LE)
        # The only wait for the device in a step without metrics, but for the gradient norm.
        *means, asked, save_failed, lost, bad_shards = torch.cat([means, flags]).tolist()
        means = {name: mean / topology.world for name, mean in zip(losses, means, strict=True)}
        gradient_norm = float(engine.get_global_grad_norm())
        if lost:
            with contextlib.suppress(UserError):  # a save under way fails for the same reason
                saver.wait()
            raise UserError(lost_message(folder))
        if bad_shards:  # several ranks may have met the same one
            which = data.bad_flags().to(device)
            dist.all_reduce(which)
            bad_shards = int(which.count_nonzero())
        if bad_shards > config.data.max_bad_shards:
            raise UserError(
                f"all ranks together could not read {bad_shards} shards (named above), more "
                f"than data.max_bad_shards={config.data.max_bad_shards}; copy them again or pack "
                "the data again, or raise it"
            )

        if engine.optimizer.overflow:
            thresholds.forget()
            skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            telemetry.say(
                f"step {step + 1} is skipped ({skipped} so far): not finite, loss {means['loss']}, "
                f"gradient norm {gradient_norm}"
            )
            if skipped_in_a_row == PATIENCE:
                raise UserError(
                    f"{PATIENCE} steps in a row had no finite loss and gradient norm, the last at "
                    f"{samples} samples with optimizer.learning_rate={rate:g}. Look at "
                    f"{folder / 'metrics.jsonl'} for when they grew; lower the learning rate, set "
                    "optimizer.gradient_clipping, or resume an older checkpoint"
                )
        else:
            skipped_in_a_row = 0
            thresholds.step(kth_LE)
            ema.update(step + 1 - skipped)
        step += 1

        telemetry.step(samples, means["loss"], gradient_norm)
        if report is not None:
            telemetry.metrics(
                samples,
                {
                    "step": step,
                    **means,
                    "gradient_norm": gradient_norm,
                    "learning_rate": rate,
                    "skipped_steps": skipped,
                    "bad_shards": int(bad_shards),
                    "data_wait_seconds": waited,
                    **report.summary(routed / topology.world),
                },
            )
        done = samples >= training.total_samples
        clock = {"samples": samples, "step": step, "skipped": skipped}
        now_due = due(config, before, samples)
        if asked:
            now_due.add("step")
        kinds = [kind for kind in ("step", "ema") if kind in now_due]
        if kinds:
            saver.begin(clock, *kinds)
        if asked or done or save_failed:
            saver.wait()
        if asked and not done:
            stopped_by = stop.told()
            break
        if "evaluation" in now_due:
            with watchdog.busy("evaluating"):
                evaluation.run(clock)

    telemetry.close()
    engine.destroy()
    if samples >= training.total_samples:
        return True
    telemetry.say(
        f"stopped by {stopped_by} after step {step}, {samples} of {training.total_samples} "
        "samples; the same command resumes from there"
    )
    return False
