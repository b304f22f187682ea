"""Figures of a live run: its ranks sample together, and the run is the same with and without."""

import time
from pathlib import Path
from typing import Any, cast

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from diffmoe.capacity.meter import CapacityByTime, merged
from diffmoe.clock import Clock
from diffmoe.config import Config
from diffmoe.data.autoencoders import autoencoder_of
from diffmoe.data.manifest import Manifest
from diffmoe.diffusion.settings import SamplerName, SamplingSettings
from diffmoe.errors import UserError
from diffmoe.evaluation import results
from diffmoe.evaluation.evaluator import Evaluator, Judges
from diffmoe.evaluation.extractors import DEFAULT
from diffmoe.evaluation.image_sets import ImageSet, Part
from diffmoe.evaluation.models import check_judges
from diffmoe.models.dit import DiT
from diffmoe.sampling.images import SampledImages, grid
from diffmoe.sampling.latents import check_guidance
from diffmoe.sampling.many_images import SampleRequest
from diffmoe.sampling.sampler import Sampler
from diffmoe.sampling.sharing import equal_share
from diffmoe.text.prompts import Prompts, create_prompts, encoder_of, read_captions
from diffmoe.training import history
from diffmoe.training.due import EVALUATION, clock_of_live
from diffmoe.training.ema import EMA
from diffmoe.training.lease import Lease
from diffmoe.training.signals import StopRequest
from diffmoe.training.telemetry import Telemetry

# How many of the images are kept to look at.
SHOWN = 64


def check(config: Config, manifest: Manifest) -> None:
    """Raise UserError for what an evaluation would fail on, before any work."""
    if config.training.evaluate_every is None:
        return
    evaluation = config.evaluation
    prompts = _prompts(config)
    check_judges(prompts, evaluation.classifier, evaluation.truth)
    _settings(config).check(config)
    check_guidance(config, _settings(config), prompts)
    autoencoder_of(manifest.latent_spec)
    if evaluation.reference and manifest.latent_spec.makes_gray:
        raise UserError(
            f"evaluation.reference={evaluation.reference}: the data is gray, and extractors take "
            "RGB; set evaluation.classifier instead, such as digits"
        )
    Evaluator(_judges(config))


class LiveEvaluation:
    """Samples `evaluation.num_samples` images on all ranks of the run; rank 0 judges them.

    EMA.sampled says with which weights. A line goes to RUN/evaluation/results.jsonl, as
    tools/evaluate.py writes it, and a picture of the first images beside it.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        network: DiT,
        engine: deepspeed.DeepSpeedEngine,
        ema: EMA,
        stop: StopRequest,
        telemetry: Telemetry,
        lease: Lease,
    ) -> None:
        self.config, self.network, self.engine, self.ema = config, network, engine, ema
        self.device = device = next(network.parameters()).device
        self.stop, self.telemetry = stop, telemetry
        self.lease = lease
        self.folder = Path(config.output) / EVALUATION
        self.settings = _settings(config)
        self.prompts = _prompts(config, device)
        choices = config.model.num_classes if self.prompts is None else len(self.prompts)
        evaluation = config.evaluation
        self.order = SampleRequest(evaluation.num_samples, tuple(range(choices)), evaluation.labels)
        autoencoder = autoencoder_of(manifest.latent_spec, device)
        self.sampler = Sampler(network, config, autoencoder, self.prompts)
        self.weights = ema.sampled
        self._evaluator: Evaluator | None = None  # rank 0 loads it when it first judges

    def forget_after(self, samples: int) -> None:
        """After a resume the evaluations past the checkpoint come again, so drop their results."""
        if self.network.topology.rank == 0:
            file = self.folder / results.FILE_NAME
            history.keep(file, lambda result: (clock_of_live(result) or 0) <= samples)

    def run(self, clock: Clock) -> None:
        """Every rank calls it. Given up where any is asked to stop meanwhile, or cannot sample."""
        began = time.monotonic()
        with self.ema.in_place_of_weights(self.engine, self.weights):
            self.network.eval()
            made = self._sample()
            self.network.train()
        if made is None:
            self.telemetry.say("asked to stop: the current evaluation is abandoned")
        elif isinstance(made, UserError):
            self.telemetry.say(f"warning: no evaluation at {clock.samples} samples: {made}")
        elif self.network.topology.rank == 0:
            try:
                self._judge(clock, *made, began)
            except (UserError, OSError) as error:  # a figure less is no reason to end a run
                self.telemetry.say(f"warning: no evaluation at {clock.samples} samples: {error}")

    def _sample(self) -> tuple[np.ndarray, CapacityByTime | None] | UserError | None:
        """All images on rank 0, none on the others.

        None on all if any was asked to stop, an error on all if any could not sample.
        """
        topology, evaluation = self.network.topology, self.config.evaluation
        images, capacity = [], []
        for start in range(0, self.order.number, evaluation.batch * topology.world):
            end = min(start + evaluation.batch * topology.world, self.order.number)
            mine = equal_share(range(start, end), topology.rank, topology.world)
            labels = [self.order.label(index, self.settings.seed) for index in mine]
            told: SampledImages | UserError
            try:
                told = self.sampler.images(
                    labels,
                    self.settings,
                    indices=mine,
                    batch=len(mine),  # at once: ranks that share experts fail behind the last pass
                )
            except UserError as error:
                told = error
            everyone: list[Any] | None = [None] * topology.world if topology.rank == 0 else None
            dist.gather_object(told, everyone)
            failed = isinstance(told, UserError)
            ends = torch.tensor([float(self.stop.asked), float(failed)], device=self.device)
            dist.all_reduce(ends)
            if ends[0]:
                return None
            if ends[1]:
                problems = (one for one in everyone or [told] if isinstance(one, UserError))
                return next(problems, UserError("another rank could not sample"))
            if everyone is not None:
                images.append(torch.cat([part.images for part in everyone])[: end - start])
                capacity += [part.capacity for part in everyone if part.capacity is not None]
        if not images:
            return np.empty(0), None
        return torch.cat(images).numpy(), merged(capacity) if capacity else None

    def _judge(
        self,
        clock: Clock,
        images: np.ndarray,
        capacity: CapacityByTime | None,
        began: float,
    ) -> None:
        network = self.network
        labels = np.array([self.order.label(k, self.settings.seed) for k in range(len(images))])
        source = ImageSet(
            len(images),
            {
                "kind": "training",
                "path": self.config.output,
                "number": len(images),
                "labels": self.order.labels,
                **vars(self.settings),
                **({} if self.prompts is None else {"captions": self.prompts.captions}),
                "model": {
                    "weights": self.weights,
                    "routing": network.routing and network.routing.kind,
                    "capacity": None,
                },
            },
            lambda: iter([Part(images, labels)]),
        )
        about = {
            "model": self.config.output,
            "clock": clock.model_dump(),
            "sampler": self.settings.chosen_sampler(self.config),
            "capacity_measured": capacity and capacity.average,
            "sampling": {
                "batch": self.config.evaluation.batch,
                "device": str(self.device),
                "ranks": network.topology.world,
            },
        }
        self.lease.check()
        picture = grid(torch.from_numpy(images[:SHOWN]), columns=8)
        self.folder.mkdir(exist_ok=True)
        picture.save(self.folder / f"samples-{clock.step:08d}.png")
        if self._evaluator is None:
            self._evaluator = Evaluator(_judges(self.config), self.device)
        found = [result | about for result in self._evaluator.measure(source)]
        results.append(self.folder / results.FILE_NAME, *found)
        values = {name: value for result in found for name, value in result["metrics"].items()}
        self.telemetry.evaluated(clock.samples, values, picture, time.monotonic() - began)


def _prompts(config: Config, device: str | torch.device = "cpu") -> Prompts | None:
    """The prompts of a text-conditioned model. Raises UserError where it does not fit the model."""
    evaluation = config.evaluation
    captions = read_captions(evaluation.prompts) if evaluation.prompts else []
    if config.model.text is not None and not captions:
        raise UserError(
            "training.evaluate_every of a text model needs captions: set evaluation.prompts to a "
            f"text file, one prompt per line (it is {evaluation.prompts})"
        )
    return create_prompts(config, encoder_of(config, evaluation.text_encoder, device), captions)


def _judges(config: Config) -> Judges:
    evaluation = config.evaluation
    return Judges(
        reference=evaluation.reference,
        extractor=evaluation.extractor or DEFAULT,
        classifier=evaluation.classifier,
        truth=evaluation.truth,
        batch=50,
    )


def _settings(config: Config) -> SamplingSettings:
    evaluation = config.evaluation
    return SamplingSettings(
        sampler=cast(SamplerName | None, evaluation.sampler),  # checked with the settings
        steps=evaluation.steps,
        guidance=evaluation.guidance,
        shift=None,
        seed=evaluation.seed,
    ).with_shift_of(config)
