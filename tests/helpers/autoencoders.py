"""Small autoencoders of diffusers with random weights."""

from pathlib import Path

import diffusers
import torch


def autoencoder(folder: Path, scale: float = 0.3, channels: int = 4) -> Path:
    torch.manual_seed(3)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=scale,
    ).save_pretrained(folder)
    return folder


def tiny(name: str) -> torch.nn.Module:
    """A class of diffusers, small and random, and the side of its images."""
    torch.manual_seed(0)
    return {
        "AutoencoderDC": lambda: diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=4,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
            scaling_factor=0.41,
        ),
        "AutoencoderTiny": lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
        ),
        "AutoencoderRAE": lambda: diffusers.AutoencoderRAE(
            encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_patch_size=14,
            decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=32, patch_size=8, encoder_input_size=56, image_size=32,
            latents_mean=torch.full((64, 1, 1), 0.3), latents_std=torch.full((64, 1, 1), 2.0),
        ),
        "AutoencoderKLQwenImage": lambda: diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 4.0, 8.0],
        ),
    }[name]()  # fmt: skip
