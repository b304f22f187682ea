"""Images from a trained network: labels and seeds in, latents out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffmoe.config import Config
from diffmoe.diffusion.ddpm import GaussianDiffusion
from diffmoe.diffusion.samplers import Progress, SampleNoise, guided, sample_ddpm, sample_flow
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT


@torch.inference_mode()
def sample_latents(
    network: DiT,
    config: Config,
    labels: Sequence[int],
    *,
    seed: int = 0,
    first_index: int = 0,
    steps: int = 250,
    guidance: float = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """Latents (n, C, H, W), fp32 on the network's device, of the given classes.

    Image k of the call has its own noise, keyed (seed, first_index + k): it is the same in any
    batch. Euler steps for flow, ancestral DDPM steps for ddpm; guidance 1 is none.
    """
    classes = config.model.num_classes
    wrong = [label for label in labels if not 0 <= label < classes]
    if wrong:
        raise UserError(
            f"class {wrong[0]} is outside 0..{classes - 1} (model.num_classes={classes})"
        )
    device = network.positions.device
    channels, size = config.model.in_channels, config.model.input_size
    indices = range(first_index, first_index + len(labels))
    noise = SampleNoise(seed, indices, (channels, size, size))
    is_flow = config.diffusion.objective == "flow"
    model = guided(
        lambda x, t, y: network(x, t, y).prediction,
        torch.tensor(labels, device=device),
        null_label=classes,
        scale=guidance,
        channels=channels,
        keep_variance=not is_flow,
    )
    start = noise.draw().to(device)
    if is_flow:
        return sample_flow(model, start, steps, progress=progress)
    return sample_ddpm(model, start, GaussianDiffusion(), steps, draw=noise.draw, progress=progress)
