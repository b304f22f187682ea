"""Classifier-free guidance: one model of (x, t) out of a network and what it is to draw."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffmoe.conditions import Condition
from diffmoe.diffusion.samplers import Model
from diffmoe.errors import UserError


def guided(
    network: Callable[[Tensor, Tensor, Condition], Tensor],
    condition: Condition,
    null: Condition,
    scale: float,
    channels: int,
    guided_channels: int | None = None,
    interval: tuple[float, float] | None = None,
    *,
    keep_variance: bool,
) -> Model:
    """Classifier-free guidance: unconditional + scale * (conditional - unconditional).

    network: (x, t, condition) -> (n, channels or 2 * channels, ...). The two passes are two
    forwards, so that they never share a token pool; at scale 1, and at times outside of `interval`,
    only the conditional one runs.
    null: the condition of the unconditional pass: the null label, or caption, or a negative prompt.
    guided_channels: guide only the first ones, the others come from the conditional pass; the
    release's DDPM runs guide 3. None guides all.
    interval: lowest and highest t, as fed to the network, that are guided (arXiv 2404.07724).
    keep_variance: append the variance channels of the conditional pass, where the network has them
    (sample_ddpm wants them, sample_flow does not).
    """
    last = channels if guided_channels is None else guided_channels
    if not 1 <= last <= channels:
        raise UserError(f"guided_channels={last}: choose 1 to {channels}")

    def model(x: Tensor, t: Tensor) -> Tensor:
        out = network(x, t, condition).float()
        if not keep_variance:
            out = out[:, :channels]
        if scale == 1 or (interval and not interval[0] <= float(t[0]) <= interval[1]):
            return out
        conditional = out[:, :last]
        unconditional = network(x, t, null)[:, :last].float()
        steered = unconditional + scale * (conditional - unconditional)
        return torch.cat([steered, out[:, last:]], 1)

    return model
