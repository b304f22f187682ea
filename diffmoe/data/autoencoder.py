"""Latents to images. Pixels are latents with an identity autoencoder."""

import torch
from torch import Tensor

from diffmoe.errors import UserError


class PixelAutoencoder:
    """The latents are the pixels, -1..1."""

    def __init__(self, scale: float | list[float] = 1.0, shift: float | list[float] = 0.0):
        self.scale, self.shift = scale, shift

    def decode(self, latents: Tensor) -> Tensor:
        """(N,C,H,W) of the model to uint8 images (N,H,W,C): round(127.5 x + 127.5), clamped."""
        return to_uint8(unscaled(latents, self.scale, self.shift).clamp(-1, 1))


class KLAutoencoder:
    """diffusers' AutoencoderKL, from a local folder or a hub id."""

    def __init__(
        self,
        path_or_id: str,
        scale: float | list[float] = 1.0,
        shift: float | list[float] = 0.0,
        device: str | torch.device = "cpu",
        batch: int = 16,
    ):
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise UserError(
                f"the autoencoder {path_or_id} needs diffusers, which is not installed; run: "
                'pip install "diffmoe[vae]"'
            ) from None
        try:
            model = AutoencoderKL.from_pretrained(path_or_id)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the autoencoder {path_or_id} cannot be loaded ({error}); give a folder or hub id "
                "of a diffusers AutoencoderKL"
            ) from error
        self.model = model.to(device).eval().requires_grad_(False)
        self.scale, self.shift, self.device, self.batch = scale, shift, device, batch

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """(N,C,H,W) of the model to uint8 images (N,H,W,3): round(127.5 x + 127.5), clamped."""
        images = [
            self.model.decode(unscaled(part.to(self.device), self.scale, self.shift)).sample
            for part in latents.split(self.batch)
        ]
        return to_uint8(torch.cat(images)).cpu()


def load_autoencoder(
    autoencoder: str,
    scale: float | list[float] = 1.0,
    shift: float | list[float] = 0.0,
    device: str | torch.device = "cpu",
) -> PixelAutoencoder | KLAutoencoder:
    """The autoencoder that a manifest's fields of these names describe."""
    if autoencoder == "identity":
        return PixelAutoencoder(scale, shift)
    return KLAutoencoder(autoencoder, scale, shift, device)


def unscaled(latents: Tensor, scale: float | list[float], shift: float | list[float]) -> Tensor:
    """Undo (z - shift) * scale; scale and shift are one number or one per channel."""
    scale, shift = (
        torch.as_tensor(value).to(latents).reshape(-1, 1, 1) for value in (scale, shift)
    )
    return latents / scale + shift


def to_uint8(images: Tensor) -> Tensor:
    """Images (N,C,H,W) in -1..1 to uint8 (N,H,W,C): round(127.5 x + 127.5), clamped to 0..255."""
    levels = (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()
