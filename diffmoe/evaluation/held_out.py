"""The held-out loss: the training objective on samples that were never trained on.

Sample i has noise keyed by (seed, i) and a time of a stratified grid, both fixed: what is left to
vary between two measurements is the model. It is the signal of small budgets, where FID still
follows the luck of the samples.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.config import Config
from diffmoe.data.examples import Examples
from diffmoe.data.fetching import Fetch
from diffmoe.data.lanes import DataSource
from diffmoe.data.manifest import Manifest
from diffmoe.data.stream import Batch, LatentStream
from diffmoe.diffusion import create_objective
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.models.routing_mode import RoutingMode
from diffmoe.seeding import keyed_generator
from diffmoe.tree import tree_map

BATCH = 64  # fixed, since with static routing a loss depends on its batch
BINS = 10


class HeldOutLoss(NamedTuple):
    """The mean over all samples, and over those of each tenth of the time from 0, noise, to 1.

    capacity: mean number of experts that worked on a token; 0 of a dense network.
    """

    loss: float
    by_time: list[float]
    capacity: float


class HeldOut:
    """`samples` fixed examples of a folder of shards, of which a rank measures some batches.

    mine: numbers of the batches to measure, of BATCH samples each (the last one may be smaller);
    all by default, and one may come twice. Raises UserError where the folder does not fit the model
    or holds fewer samples.
    """

    def __init__(
        self, config: Config, path: str, samples: int, mine: Sequence[int] | None = None
    ) -> None:
        manifest = Manifest.load(path, "validation.path")
        manifest.check_model(config.model)
        check_samples(path, manifest, samples)
        self.config, self.samples = config, samples
        self.objective = create_objective(config)
        self.mine = range(-(-samples // BATCH)) if mine is None else mine
        order = torch.randperm(samples, generator=keyed_generator(config.seed, "held-out times"))
        self.time_N = (order + 0.5) / samples
        self._read = dict(self._samples(path, manifest))

    def _samples(self, path: str, manifest: Manifest) -> Iterator[tuple[int, Batch]]:
        """This rank's batches by number: the first `samples` of one lane's first epoch."""
        fetch = Fetch.of(self.config.data)
        source = DataSource(path, manifest, lanes=1, seed=self.config.seed, fetch=fetch)
        stream = LatentStream(source, [0], BATCH, captions=self.config.model.text is not None)
        for number, batch in enumerate(islice(stream, max(self.mine) + 1)):
            if number in self.mine:
                size = min(BATCH, self.samples - number * BATCH)
                yield number, tree_map(itemgetter(slice(size)), batch)

    def examples(self, number: int) -> Examples:
        """Batch `number`, noised."""
        batch = self._read[number]
        first = number * BATCH
        indices = range(first, first + len(batch.latents))
        shape = batch.latents.shape[1:]
        noise = torch.stack(
            [
                torch.randn(shape, generator=keyed_generator(self.config.seed, "held-out", index))
                for index in indices
            ]
        )
        t = self.objective.timesteps_at(self.time_N[indices.start : indices.stop])
        x_t = self.objective.corrupt(batch.latents, noise, t)
        condition = batch.labels if batch.text is None else batch.text
        return Examples(batch.latents, noise, x_t, t, condition)

    @torch.inference_mode()
    def measure(self, network: DiT) -> Tensor:
        """(2, samples) float64 on the CPU: loss and experts per token; 0 of what is not mine.

        The network routes as it is set to, in evaluation. Ranks that share experts must have
        equally many batches.
        """
        measured_2N = torch.zeros(2, self.samples, dtype=torch.float64)
        device = network.positions.device
        for number in self.mine:
            one = tree_map(lambda tensor: tensor.to(device), self.examples(number))
            out = network(*one.inputs)
            loss_B = self.objective.loss(out.prediction, one.x_t, one.data, one.noise, one.t)[
                "loss"
            ]
            first, size = number * BATCH, len(loss_B)
            measured_2N[0, first : first + size] = loss_B.double().cpu()
            if out.routing:
                selected_LES = torch.stack([layer.selected_ES for layer in out.routing])
                experts_BT = selected_LES.double().sum(1).mean(0).view(size, -1)
                measured_2N[1, first : first + size] = experts_BT.mean(dim=1).cpu()
        return measured_2N

    def summary(self, measured_2N: Tensor) -> HeldOutLoss:
        """Means over all samples, each measured. A bin of time without a sample counts as NaN."""
        losses_N, experts_N = measured_2N
        bins_N = (self.time_N * BINS).long().clamp(max=BINS - 1)
        by_time = [losses_N[bins_N == bin].mean().item() for bin in range(BINS)]
        return HeldOutLoss(losses_N.mean().item(), by_time, experts_N.mean().item())


def check_samples(path: str, manifest: Manifest, samples: int) -> None:
    """Raise UserError where the folder holds fewer."""
    if samples > manifest.samples:
        raise UserError(
            f"validation.samples={samples}: {path} holds {manifest.samples}; choose as many or "
            "fewer"
        )


def check_untrained(path: str, held_out: Manifest, trained_path: str, trained: Manifest) -> None:
    """Raise UserError where a shard of the folder `path` is one that is trained on."""
    known = {shard.sha256 for shard in trained.shards}
    for shard in held_out.shards:
        if shard.sha256 in known:
            raise UserError(
                f"validation.path={path}: its shard {shard.name} is one of data.path="
                f"{trained_path}, so it is trained on; hold samples out of the data "
                "(tools/check_data.py --hold-out)"
            )


def training_routing(network: DiT) -> RoutingMode | None:
    """That of training, in evaluation: every expert takes its K of a batch. None: no choice."""
    return RoutingMode("static") if network.has_thresholds else None
