"""What a network is looked at with: real data at training's noise levels, or its own sampling."""

from collections.abc import Iterator, Sequence
from operator import itemgetter

from diffmoe.capacity.calibration import Passes
from diffmoe.capacity.forward import Forward, Observer
from diffmoe.config import Config
from diffmoe.data.examples import Examples, micro_batches
from diffmoe.data.fetching import Fetch
from diffmoe.data.lanes import DataSource
from diffmoe.data.manifest import Manifest
from diffmoe.data.stream import LatentStream
from diffmoe.diffusion import create_objective
from diffmoe.diffusion.settings import SamplingSettings, time_of
from diffmoe.models.dit import DiT
from diffmoe.sampling.latents import sample_latents
from diffmoe.text.prompts import Prompts
from diffmoe.tree import tree_map


def noise_passes(network: DiT, config: Config, samples: int, batch: int, seed: int) -> Passes:
    """Passes over `samples` real samples of data.path, noised as training does it."""
    parts = list(real_examples(config, samples, batch, seed))

    def run(observe: Observer) -> None:
        for part in parts:
            part = tree_map(lambda tensor: tensor.to(network.positions.device), part)
            out = network(part.x_t, part.t, part.condition)
            # One pass holds many times; it counts for their mean.
            observe(Forward(time_of(config, part.t).mean(), False, out.routing))

    return Passes(len(parts), run)


def real_examples(config: Config, samples: int, batch: int, seed: int) -> Iterator[Examples]:
    """`samples` training examples of data.path, at most `batch` at a time, keyed by the seed."""
    manifest = Manifest.load(config.data.path)
    manifest.check_model(config.model)
    config = config.replace({"seed": seed, "training.accumulation": 1})
    objective, lanes = create_objective(config.diffusion), range(config.data.lanes)
    source = DataSource(
        config.data.path,
        manifest,
        lanes=config.data.lanes,
        seed=seed,
        # The cache of a run from elsewhere is not used: old shards would be removed from it.
        fetch=Fetch(allow_commands=config.data.allow_commands),
    )
    captions = config.model.text is not None
    stream = LatentStream(source, lanes, config.samples_per_lane, captions=captions)
    clock, missing = 0, samples
    for latents in stream:
        (examples,) = micro_batches(latents, config, lanes, clock, objective)
        clock += len(examples.t)
        number = min(missing, len(examples.t))
        missing -= number
        for start in range(0, number, batch):
            some = slice(start, min(start + batch, number))
            yield tree_map(itemgetter(some), examples)
        if not missing:
            return


def trajectory_passes(
    network: DiT,
    config: Config,
    labels: Sequence[int],
    batch: int,
    settings: SamplingSettings,
    prompts: Prompts | None = None,
) -> Passes:
    """The passes of sampling images of `labels`."""
    starts = range(0, len(labels), batch)

    def run(observe: Observer) -> None:
        for start in starts:
            some = labels[start : start + batch]
            indices = range(start, start + len(some))
            sample_latents(
                network, config, some, indices, settings, prompts=prompts, observe=observe
            )

    # Guidance and Heun take up to two passes a step each.
    return Passes(len(starts) * settings.steps * 2, run)
