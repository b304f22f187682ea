"""Classifier-free guidance: makes a model of (x, t) from a network and a condition."""

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

    network: (x, t, condition) -> (n, channels or 2 * channels, ...). The two passes are separate
    calls, so that they never share a token pool; at scale 1, and at times outside of `interval`,
    only the conditional one runs.
    null: condition of the unconditional pass: the null label or caption, or a negative prompt.
    guided_channels: guide only the first ones; the others are the conditional pass's. The
    release's DDPM runs guide 3. None: all.
    interval: lowest and highest t that are guided, as the network gets t (arXiv 2404.07724).
    keep_variance: append the variance channels of the conditional pass, where the network has them:
    True for sample_ddpm, False for sample_flow.
    Raises UserError for guided_channels that are not there.
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
