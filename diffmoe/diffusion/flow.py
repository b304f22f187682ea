"""Flow matching along straight lines from noise (t = 0) to data (t = 1)."""

from typing import Literal, TypeVar

import torch
from torch import Tensor

from diffmoe.errors import UserError

Share = TypeVar("Share", float, Tensor)


def shifted(noise_share: Share, shift: float) -> Share:
    """The noise share s = 1 - t becomes shift * s / (1 + (shift - 1) * s); 0 and 1 stay.

    Neighboring pixels of large images are alike, so the image shows through more noise. A shift
    above 1 moves times to noise levels at which the content is still open (arXiv 2403.03206,
    Eq. 23).
    """
    return shift * noise_share / (1 + (shift - 1) * noise_share)


class FlowMatching:
    """The paper's flow objective with its release's direction: v = data - noise, t = 1 is data.

    timesteps: density of t in training, "uniform" on [0, 1) or "logit_normal", the sigmoid of a
    standard normal variable (arXiv 2403.03206, section 3.1).
    shift: above 1 moves that density towards noise; see `shifted`. Raises UserError for other
    timesteps.
    """

    def __init__(
        self, timesteps: Literal["uniform", "logit_normal"] = "uniform", shift: float = 1.0
    ) -> None:
        if timesteps not in ("uniform", "logit_normal"):
            raise UserError(f"flow timesteps={timesteps!r}: choose 'uniform' or 'logit_normal'")
        self.timesteps, self.shift = timesteps, shift

    def sample_timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        """t (n,), fp32 on the CPU, given to the network unscaled."""
        if self.timesteps == "uniform":
            t = torch.rand(n, generator=generator)
        else:
            t = torch.randn(n, generator=generator).sigmoid()
        return t if self.shift == 1 else 1 - shifted(1 - t, self.shift)

    def timesteps_at(self, time_N: Tensor) -> Tensor:
        """t of times from 0, noise, to 1, data: the same."""
        return time_N.float()

    def corrupt(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = t * data + (1 - t) * noise, fp32 (n, C, H, W); t (n,)."""
        t = t.to(data.device).float().view(-1, *[1] * (data.ndim - 1))
        return t * data.float() + (1 - t) * noise.float()

    def loss(
        self, prediction: Tensor, x_t: Tensor, data: Tensor, noise: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """Mean squared error against data - noise, per sample: {"loss", "mse"}, each (n,) fp32.

        prediction: (n, C, H, W), or (n, 2C, H, W) of a network with variance channels, which a flow
        does not use. x_t and t are not used: all objectives take the same arguments.
        """
        channels = data.shape[1]
        if prediction.shape[1] not in (channels, 2 * channels):
            raise ValueError(f"{prediction.shape[1]} predicted channels for data of {channels}")
        velocity = prediction[:, :channels].float()
        mse = (velocity - (data.float() - noise.float())).square().flatten(1).mean(1)
        return {"loss": mse, "mse": mse}
