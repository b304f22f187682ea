"""Sampled images with what they cost, and one picture of many."""

from typing import NamedTuple

from PIL import Image
from torch import Tensor

from diffmoe.capacity.meter import CapacityByTime


class SampledImages(NamedTuple):
    """images: uint8 (n, H, W, C), on the CPU. capacity: C by time; None without experts.

    evaluations: of the network, the mean over batches, where the sampler chooses their number
    (dopri5); else None. The two passes of guidance count as one.
    """

    images: Tensor
    capacity: CapacityByTime | None
    evaluations: float | None = None


def dopri5_note(evaluations: float) -> str:
    """The number of evaluations that dopri5 took, why, and what to do about it."""
    return (
        f"dopri5 took {evaluations:.0f} evaluations a batch, heun takes two a step (the velocity "
        "of a mixture jumps where an expert takes or drops a token, which makes dopri5 take "
        "short steps)"
    )


def grid(images: Tensor, columns: int) -> Image.Image:
    """One picture of uint8 images (n, H, W, C), row by row; the last row may end in black."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    padded = images.new_zeros(rows * columns, height, width, channels)
    padded[:n] = images
    placed = padded.view(rows, columns, height, width, channels).transpose(1, 2)
    picture = placed.reshape(rows * height, columns * width, channels)
    return Image.fromarray(picture.squeeze(-1).numpy())
