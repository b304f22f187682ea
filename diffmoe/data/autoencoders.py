"""Images to latents and back. Pixels are latents of the identity autoencoder."""

import os

import torch
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.latent_spec import LatentSpec, Numbers


class PixelAutoencoder:
    """The identity: the latents are the pixels, -1..1."""

    def __init__(self, scale: Numbers = 1.0, shift: Numbers = 0.0):
        self.scale, self.shift = scale, shift

    def decode(self, latents: Tensor) -> Tensor:
        """The model's (N,C,H,W) to uint8 images (N,H,W,C): round(127.5 x + 127.5), clamped."""
        return to_uint8(unscaled(latents, self.scale, self.shift).clamp(-1, 1))


class KLAutoencoder:
    """diffusers' AutoencoderKL, from a local folder or a hub id.

    scale, shift: the diffusion model works on (z - shift) * scale of the autoencoder's latents z.
    pixel_range: the numbers that are black and white for the autoencoder.
    batch: images per pass.

    Raises UserError if diffusers is not installed or the autoencoder cannot be loaded.
    """

    def __init__(
        self,
        path_or_id: str,
        scale: Numbers = 1.0,
        shift: Numbers = 0.0,
        device: str | torch.device = "cpu",
        batch: int = 16,
        pixel_range: tuple[float, float] = (-1.0, 1.0),
    ):
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise UserError(
                f"the autoencoder {path_or_id} needs diffusers, which is not installed; run: "
                'pip install "diffmoe[vae]"'
            ) from None
        try:
            model = AutoencoderKL.from_pretrained(path_or_id, low_cpu_mem_usage=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the autoencoder {path_or_id} cannot be loaded ({error}); give a folder or hub id "
                "of a diffusers AutoencoderKL"
            ) from error
        self.model = model.to(device).eval().requires_grad_(False)
        self.scale, self.shift, self.device, self.batch = scale, shift, device, batch
        self.black, self.white = pixel_range

    @classmethod
    def with_own_scale(
        cls, path_or_id: str, device: str | torch.device = "cpu", batch: int = 16
    ) -> "KLAutoencoder":
        """With the scale and shift of the autoencoder's own configuration."""
        autoencoder = cls(path_or_id, device=device, batch=batch)
        config = autoencoder.model.config
        scale, shift = config.scaling_factor, config.get("shift_factor") or 0.0
        # Some have per-channel statistics: (z - latents_mean) * scaling_factor / latents_std.
        if config.get("latents_mean") is not None:
            shift = list(config.latents_mean)
        if config.get("latents_std") is not None:
            scale = [scale / deviation for deviation in config.latents_std]
        autoencoder.scale, autoencoder.shift = scale, shift
        return autoencoder

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(C,h,w) of the latent of a square image of `size` pixels."""
        config = self.model.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        if size % factor:
            raise UserError(
                f"--size {size} is not a multiple of {factor}, by which the autoencoder downsamples"
            )
        return (config.latent_channels, size // factor, size // factor)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 images (N,H,W,3) to moments (N,2C,h,w): mean and log-variance, fp32, unscaled.

        The log-variance is clamped to -30..20, as diffusers does before drawing.
        """
        moments = []
        for part in images.split(self.batch):
            pixels = part.to(self.device).permute(0, 3, 1, 2).float() / 255
            posterior = self.model.encode(
                pixels * (self.white - self.black) + self.black
            ).latent_dist
            moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu())
        return torch.cat(moments)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """The model's (N,C,h,w) to uint8 images (N,H,W,3), rounded and clamped."""
        images = [
            self.model.decode(unscaled(part.to(self.device), self.scale, self.shift)).sample
            for part in latents.split(self.batch)
        ]
        share = (torch.cat(images).float() - self.black) / (self.white - self.black)
        return to_uint8(share * 2 - 1).cpu()


def load_autoencoder(
    autoencoder: str,
    scale: Numbers = 1.0,
    shift: Numbers = 0.0,
    device: str | torch.device = "cpu",
    pixel_range: tuple[float, float] = (-1.0, 1.0),
) -> PixelAutoencoder | KLAutoencoder:
    """The autoencoder for the values of a manifest's fields of the same names."""
    if autoencoder == "identity":
        return PixelAutoencoder(scale, shift)
    black, white = pixel_range
    return KLAutoencoder(autoencoder, scale, shift, device, pixel_range=(black, white))


def autoencoder_of(
    latents: LatentSpec, device: str | torch.device = "cpu"
) -> PixelAutoencoder | KLAutoencoder:
    """The autoencoder that decodes such latents."""
    return load_autoencoder(
        latents.autoencoder, latents.scale, latents.shift, device, latents.pixel_range
    )


def canonical_name(path_or_id: str) -> str:
    """A hub id unchanged, a folder as an absolute path, so that it is found from anywhere."""
    return os.path.abspath(path_or_id) if os.path.isdir(path_or_id) else path_or_id


def unscaled(latents: Tensor, scale: Numbers, shift: Numbers) -> Tensor:
    """Undo (z - shift) * scale. scale, shift: one number or one per channel."""
    by, plus = (torch.as_tensor(value).to(latents).reshape(-1, 1, 1) for value in (scale, shift))
    return latents / by + plus


def to_uint8(images: Tensor) -> Tensor:
    """Images (N,C,H,W) in -1..1 to uint8 (N,H,W,C): round(127.5 x + 127.5), clamped to 0..255.

    Raises UserError for NaN.
    """
    if images.isnan().any():
        raise UserError(
            "the autoencoder gave NaN pixels, which would be black images; are its weights "
            "complete, and is the scale of the latents right?"
        )
    levels = (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()
