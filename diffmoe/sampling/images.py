"""Images of given labels, a batch at a time, with what they cost."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from diffmoe.capacity.forward import Forward, Observer
from diffmoe.capacity.meter import CapacityByTime, CapacityMeter
from diffmoe.config import Config
from diffmoe.diffusion.samplers import Progress
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.models.dit import DiT
from diffmoe.sampling.latents import sample_latents
from diffmoe.text.prompts import Prompts

# Latents (n, C, H, W) -> uint8 images (n, H, W, C); an autoencoder's decode.
Decode = Callable[[Tensor], Tensor]


def sample_images(
    network: DiT,
    config: Config,
    decode: Decode,
    labels: Sequence[int],
    indices: Sequence[int],
    settings: SamplingSettings,
    *,
    prompts: Prompts | None = None,
    batch: int = 50,
    watch: Callable[[int], Observer] | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, CapacityByTime | None]:
    """uint8 images (n, H, W, C) on the CPU, and C by time (None without experts).

    prompts: of a text model, whose labels are numbers of its captions.
    watch: called with each batch's size, gives an observer of its evaluations.
    progress: called with the number of images done; a batch counts by its finished steps.
    """
    meter, parts = CapacityMeter(), []
    for start in range(0, len(labels), batch):
        some = indices[start : start + batch]

        def part_done(fraction: float, start=start, some=some) -> None:
            if progress is not None:
                progress(start + fraction * len(some))

        observers = [meter] if watch is None else [meter, watch(len(some))]

        def observe(forward: Forward, observers=observers) -> None:
            for observer in observers:
                observer(forward)

        latents = sample_latents(
            network,
            config,
            labels[start : start + batch],
            some,
            settings,
            prompts=prompts,
            observe=observe,
            progress=part_done,
        )
        parts.append(decode(latents).cpu())
    return torch.cat(parts), meter.read()


class EvaluationCount:
    """A `watch` of sample_images: how many evaluations each batch took.

    The two passes of guidance count as one. dopri5 alone chooses the number itself.
    """

    def __init__(self) -> None:
        self._batches: list[int] = []

    def __call__(self, size: int) -> Observer:
        self._batches.append(0)
        return self._observe

    def _observe(self, forward: Forward) -> None:
        self._batches[-1] += not forward.unconditional

    @property
    def mean(self) -> float:
        return sum(self._batches) / len(self._batches)

    @staticmethod
    def told(mean: float) -> str:
        """In words, with the reason and the way out."""
        return (
            f"dopri5 took {mean:.0f} evaluations a batch, heun takes two a step (of a mixture the "
            "velocity jumps where an expert takes a token up or leaves it, so dopri5 steps short)"
        )


def grid(images: Tensor, columns: int) -> Image.Image:
    """One picture of uint8 images (n, H, W, C), row by row; the last row may stay black."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    padded = torch.cat([images, images.new_zeros(rows * columns - n, height, width, channels)])
    placed = padded.view(rows, columns, height, width, channels).transpose(1, 2)
    picture = placed.reshape(rows * height, columns * width, channels)
    return Image.fromarray(picture.squeeze(-1).numpy())
