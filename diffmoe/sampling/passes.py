"""Forward passes to calibrate or analyze on: real data with training's noise, or sampling."""

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
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.sampling.sampler import Sampler
from diffmoe.tree import tree_map


def noise_passes(network: DiT, config: Config, samples: int, batch: int, seed: int) -> Passes:
    """Passes over `samples` real samples of data.path, with noise as in training."""
    parts = list(real_examples(config, samples, batch, seed))
    device = next(network.parameters()).device

    def run(observe: Observer) -> None:
        for part in parts:
            part = tree_map(lambda tensor: tensor.to(device), part)
            out = network(part.x_t, part.t, part.condition)
            # One pass holds many times; it counts for their mean.
            observe(Forward(time_of(config, part.t).mean(), False, out.routing))

    return Passes(len(parts), run)


def real_examples(config: Config, samples: int, batch: int, seed: int) -> Iterator[Examples]:
    """`samples` training examples of data.path, at most `batch` at a time, keyed by the seed."""
    path = config.data.path
    if path is None:
        raise UserError("the model does not say where its data is; give the folder (--data DIR)")
    manifest = Manifest.load(path)
    manifest.check_model(config.model)
    config = config.replace({"seed": seed, "training.accumulation": 1})
    objective, lanes = create_objective(config), range(config.data.lanes)
    source = DataSource(
        path,
        manifest,
        lanes=config.data.lanes,
        seed=seed,
        # Without data.cache: a run from elsewhere must not have shards removed on this machine.
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
    sampler: Sampler, labels: Sequence[int], batch: int, settings: SamplingSettings
) -> Passes:
    """The passes of sampling images of `labels`."""

    def run(observe: Observer) -> None:
        sampler.latents(labels, settings, batch=batch, observe=observe)

    # Guidance and Heun take up to two passes a step each.
    return Passes(len(range(0, len(labels), batch)) * settings.steps * 2, run)
