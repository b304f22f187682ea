"""A small AutoencoderKL of diffusers."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL


def autoencoder(folder: Path, scale: float = 0.3, channels: int = 4) -> Path:
    torch.manual_seed(3)
    AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=scale,
    ).save_pretrained(folder)
    return folder
