"""Flow matching along straight lines from noise (t = 0) to data (t = 1)."""

from typing import Literal

import torch
from torch import Tensor

from diffmoe.errors import UserError


class FlowMatching:
    """The paper's flow objective in its release's orientation: v = data - noise, t = 1 is data.

    timesteps: density of t in training, "uniform" on [0, 1) or "logit_normal", the sigmoid of a
    standard normal variable (arXiv 2403.03206, section 3.1).
    """

    def __init__(self, timesteps: Literal["uniform", "logit_normal"] = "uniform") -> None:
        if timesteps not in ("uniform", "logit_normal"):
            raise UserError(f"flow timesteps={timesteps!r}: choose 'uniform' or 'logit_normal'")
        self.timesteps = timesteps

    def sample_timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        """t (n,), fp32 on the CPU, fed to the network unscaled."""
        if self.timesteps == "uniform":
            return torch.rand(n, generator=generator)
        return torch.randn(n, generator=generator).sigmoid()

    def corrupt(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = t * data + (1 - t) * noise, fp32 (n, C, H, W); t (n,)."""
        t = t.to(data.device).float().view(-1, *[1] * (data.ndim - 1))
        return t * data.float() + (1 - t) * noise.float()

    def loss(
        self, prediction: Tensor, x_t: Tensor, data: Tensor, noise: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """Mean squared error against data - noise, per sample: {"loss", "mse"}, each (n,) fp32.

        prediction: (n, C, H, W), or (n, 2C, H, W) of a network with sigma channels, which a flow
        does not use. x_t and t are not needed here; every objective takes the same arguments.
        """
        channels = data.shape[1]
        if prediction.shape[1] not in (channels, 2 * channels):
            raise ValueError(f"{prediction.shape[1]} predicted channels for data of {channels}")
        velocity = prediction[:, :channels].float()
        mse = (velocity - (data.float() - noise.float())).square().flatten(1).mean(1)
        return {"loss": mse, "mse": mse}
