"""Representation alignment: one block's tokens against a frozen encoder's features of the image.

REPA (arXiv 2410.06940) projects with an MLP, iREPA (arXiv 2512.10794) with a convolution. Z:
channels of the features.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffmoe.config import AlignConfig

# The network's attribute, and what its parameters' names begin with. They are trained beside the
# model and no part of it: checkpoints hold them, averages in files and exported models do not.
PROJECTOR = "projector"
# iREPA's share of the mean over an image's tokens that is taken off, channel by channel.
_MEAN_SHARE = 0.6


class Projector(nn.Module):
    """Tokens (B, T, D) to the features' channels, (B, T, Z).

    grid: rows and columns of tokens, T in all.
    """

    def __init__(self, align: AlignConfig, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.layers: nn.Module
        if align.projector == "conv":
            self.layers = nn.Conv2d(width, align.width, kernel_size=3, padding=1)
        else:
            self.layers = nn.Sequential(
                nn.Linear(width, align.hidden),
                nn.SiLU(),
                nn.Linear(align.hidden, align.hidden),
                nn.SiLU(),
                nn.Linear(align.hidden, align.width),
            )

    def forward(self, x_BTD: Tensor) -> Tensor:
        if isinstance(self.layers, nn.Conv2d):
            x_BDhw = x_BTD.transpose(1, 2).unflatten(2, self.grid)
            return self.layers(x_BDhw).flatten(2).transpose(1, 2)
        return self.layers(x_BTD)


def is_of_projector(name: str) -> bool:
    """Whether a parameter of the network is the projector's."""
    return name.startswith(f"{PROJECTOR}.")


def alignment_targets(features_BZhw: Tensor, grid: tuple[int, int], spatial: bool) -> Tensor:
    """What the projected tokens are held against: (B, T, Z), in fp32 at least.

    Another grid than that of the tokens is interpolated, bilinearly. spatial: iREPA's
    normalization over the tokens of an image, y' = (y - 0.6 mean) / (std + 1e-6).
    """
    features_BZhw = _in_fp32(features_BZhw)
    if features_BZhw.shape[2:] != grid:
        features_BZhw = F.interpolate(
            features_BZhw, grid, mode="bilinear", antialias=True, align_corners=False
        )
    y_BTZ = features_BZhw.flatten(2).transpose(1, 2)
    if spatial:
        y_BTZ = y_BTZ - _MEAN_SHARE * y_BTZ.mean(dim=1, keepdim=True)
        y_BTZ = y_BTZ / (y_BTZ.std(dim=1, keepdim=True) + 1e-6)
    return y_BTZ


def alignment_loss(projected_BTZ: Tensor, targets_BTZ: Tensor) -> Tensor:
    """-1 to 1: minus the mean cosine over all tokens (REPA, Eq. 8), in fp32 at least."""
    return -F.cosine_similarity(_in_fp32(projected_BTZ), targets_BTZ, dim=-1).mean()


def _in_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
