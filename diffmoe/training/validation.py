"""The held-out loss of a live run, on all its ranks; the run is the same with and without it."""

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from diffmoe.config import Config
from diffmoe.data.fetching import Fetch, check_addresses
from diffmoe.data.manifest import Manifest
from diffmoe.evaluation.held_out import (
    BATCH,
    HeldOut,
    HeldOutLoss,
    check_samples,
    check_untrained,
    training_routing,
)
from diffmoe.models.dit import DiT
from diffmoe.sampling.sharing import equal_share
from diffmoe.training.ema import EMA

# By name: numbers, and lists of them by time.
Metrics = dict[str, float | list[float]]


def check(config: Config, manifest: Manifest) -> None:
    """Raise UserError where the held-out loss could not be measured, or would be of training data.

    manifest: of data.path.
    """
    path = config.validation.path
    if not config.training.validate_every or path is None:
        return
    held_out = Manifest.load(path, "validation.path")
    check_addresses(path, held_out, Fetch.of(config.data))
    held_out.check_model(config.model)
    check_samples(path, held_out, config.validation.samples)
    check_untrained(path, held_out, str(config.data.path), manifest)


class Validation:
    """Measures `validation.samples` of validation.path with the averaged and the live weights.

    Each with the routing of inference and, where that differs, with that of training. Every rank
    makes a method's calls: ranks that share experts route together.
    """

    def __init__(self, config: Config, network: DiT, engine: DeepSpeedEngine, ema: EMA) -> None:
        self.network, self.engine, self.ema = network, engine, ema
        rank, world = network.topology.rank, network.topology.world
        settings = config.validation
        assert settings.path is not None  # checked with the configuration
        batches = range(-(-settings.samples // BATCH))
        mine = equal_share(batches, rank, world)
        self.held_out = HeldOut(config, settings.path, settings.samples, mine)
        # The last ranks may repeat the last batch; it counts once.
        self.counts_N = torch.arange(settings.samples) // BATCH // len(mine) == rank
        # By what their metrics' names end in; one entry where nothing is averaged.
        self.weights = {"_live": "live"} if ema.sampled != "live" else {}
        self.weights = {"": ema.sampled, **self.weights}

    def run(self) -> Metrics:
        """The metrics, the same on every rank: validation_loss is that of the averaged weights."""
        found: Metrics = {}
        self.network.eval()
        for suffix, prefix in self.weights.items():
            with self.ema.in_place_of_weights(self.engine, prefix):
                measured = self._measured()
                found[f"validation_loss{suffix}"] = measured.loss
                if not suffix:
                    found["validation_by_time"] = measured.by_time
                    found["validation_capacity"] = measured.capacity
                mode = training_routing(self.network)
                if mode is not None:
                    with self.network.routed(mode):
                        found[f"validation_loss{suffix}_training_routing"] = self._measured().loss
        self.network.train()
        return found

    def _measured(self) -> HeldOutLoss:
        """Of all ranks. Each number is one rank's plus zeros, so no order of ranks rounds."""
        measured_2N = self.held_out.measure(self.network) * self.counts_N
        measured_2N = measured_2N.to(self.network.positions.device)
        dist.all_reduce(measured_2N)
        return self.held_out.summary(measured_2N.cpu())
