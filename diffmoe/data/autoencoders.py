"""Images to latents and back. Pixels are latents of the identity autoencoder."""

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from diffmoe.errors import UserError
from diffmoe.latent_spec import LatentSpec, Numbers
from diffmoe.named_code import SCRIPTS, import_function, open_torchscript

_FUNCTION = re.compile(r"[\w.]+:\w+")  # package.module:function


class PixelAutoencoder:
    """The identity: the latents are the pixels, -1..1."""

    def __init__(self, scale: Numbers = 1.0, shift: Numbers = 0.0):
        self.scale, self.shift = scale, shift

    def decode(self, latents: Tensor) -> Tensor:
        """The model's (N,C,H,W) to uint8 images (N,H,W,C): round(127.5 x + 127.5), clamped."""
        return to_uint8(unscaled(latents, self.scale, self.shift).clamp(-1, 1))


class NoDecoder:
    """Leaves latents as the autoencoder's decoder takes them: for one that lies elsewhere."""

    def __init__(self, scale: Numbers = 1.0, shift: Numbers = 0.0):
        self.scale, self.shift = scale, shift

    def decode(self, latents: Tensor) -> Tensor:
        """The model's (N,C,H,W) to the autoencoder's z, (N,C,H,W) fp32."""
        return unscaled(latents, self.scale, self.shift).float()


class DiffusersAutoencoder:
    """Any autoencoder of images of diffusers, by the class that its configuration names.

    Those of videos (Wan, Qwen-Image, ...) take an image as a video of one frame. The latents of
    FLUX.2 are, as for its own transformer, 2x2 of the autoencoder's z in one place: z (c,2h,2w) is
    (4c,h,w), and its batch norm has their statistics.

    path_or_id: a local folder, a hub id OWNER/NAME, or OWNER/NAME/SUBFOLDER.
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
        model: Any = _load(path_or_id)
        self.model = model.to(device).eval().requires_grad_(False)
        self.scale, self.shift, self.device, self.batch = scale, shift, device, batch
        self.pixel_range = pixel_range
        self._of_videos = any(isinstance(part, torch.nn.Conv3d) for part in model.modules())
        self._patch = 2 if type(model).__name__ == "AutoencoderKLFlux2" else 1

    @classmethod
    def with_own_scale(
        cls, path_or_id: str, device: str | torch.device = "cpu", batch: int = 16
    ) -> "DiffusersAutoencoder":
        """With scale, shift and pixel range of the autoencoder's own configuration."""
        autoencoder = cls(path_or_id, device=device, batch=batch)
        config = autoencoder.model.config
        if type(autoencoder.model).__name__ == "AutoencoderRAE":
            autoencoder.pixel_range = (0.0, 1.0)
            return autoencoder  # it normalizes latents itself
        if type(autoencoder.model).__name__ == "AutoencoderKLFlux2":
            norm = autoencoder.model.bn
            autoencoder.shift = norm.running_mean.tolist()
            autoencoder.scale = (norm.running_var + norm.eps).rsqrt().tolist()
            return autoencoder
        scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
        # Some have per-channel statistics: (z - latents_mean) * scaling_factor / latents_std.
        if config.get("latents_mean") is not None:
            shift = list(config.latents_mean)
        if config.get("latents_std") is not None:
            scale = [scale / deviation for deviation in config.latents_std]
        autoencoder.scale, autoencoder.shift = scale, shift
        return autoencoder

    def describe(self, height: int, width: int) -> tuple[tuple[int, int, int], bool]:
        """Of an image of height x width pixels the latent's (C,h,w), and whether it is drawn from
        a distribution, or computed. Raises UserError for a size that it cannot take.
        """
        size = f"--size {height}x{width}"
        try:
            values, draws = self._encode(torch.zeros(1, height, width, 3, dtype=torch.uint8))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{size} does not fit the autoencoder ({error})") from None
        _, channels, rows, columns = values.shape
        if height % rows or width % columns:
            raise UserError(
                f"{size} is not a multiple of {height // rows}, by which the autoencoder "
                "downsamples"
            )
        return (channels // (1 + draws), rows, columns), draws

    def encode(self, images: Tensor) -> Tensor:
        """uint8 images (N,H,W,3) to fp32 latents (N,C,h,w), unscaled.

        Where latents are drawn, to moments (N,2C,h,w): mean and log-variance, which is clamped to
        -30..20, as diffusers does before drawing.
        """
        return torch.cat([self._encode(part)[0] for part in images.split(self.batch)])

    @torch.inference_mode()
    def _encode(self, images: Tensor) -> tuple[Tensor, bool]:
        """What `encode` gives, and whether these are moments."""
        black, white = self.pixel_range
        pixels = images.to(self.device).permute(0, 3, 1, 2).float() / 255
        pixels = pixels * (white - black) + black
        encoded = self.model.encode(pixels[:, :, None] if self._of_videos else pixels)
        draws = hasattr(encoded, "latent_dist")
        if draws:
            posterior = encoded.latent_dist
            moments = [posterior.mean, posterior.logvar]
            if self._patch > 1:
                moments = [pixel_unshuffle(part, self._patch) for part in moments]
            values = torch.cat(moments, dim=1)
        else:
            values = next(iter(encoded.values()))
        return (values[:, :, 0] if self._of_videos else values).float().cpu(), draws

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """The model's (N,C,h,w) to uint8 images (N,H,W,3), rounded and clamped."""
        images = []
        for part in latents.split(self.batch):
            z = unscaled(part.to(self.device), self.scale, self.shift)
            if self._patch > 1:
                z = pixel_shuffle(z, self._patch)
            decoded = self.model.decode(z[:, :, None] if self._of_videos else z).sample
            images.append(decoded[:, :, 0] if self._of_videos else decoded)
        return _levels(torch.cat(images), self.pixel_range)


class NamedDecoder:
    """A decoder that the user names: a TorchScript FILE.pt or `package.module:function`.

    It takes z (N,C,h,w) in fp32, as its own encoder made them, and returns images (N,3,H,W), or
    (N,1,H,W), of which the numbers of `pixel_range` are black and white.
    """

    def __init__(
        self,
        specification: str,
        scale: Numbers = 1.0,
        shift: Numbers = 0.0,
        device: str | torch.device = "cpu",
        batch: int = 16,
        pixel_range: tuple[float, float] = (-1.0, 1.0),
    ):
        self.device = torch.device(device)
        if specification.endswith(SCRIPTS):
            self._decode: Callable[[Tensor], Tensor] = open_torchscript(
                Path(specification), self.device
            )
        else:
            self._decode = import_function(specification)
        self.specification, self.batch = specification, batch
        self.scale, self.shift, self.pixel_range = scale, shift, pixel_range

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """The model's (N,C,h,w) to uint8 images (N,H,W,C), rounded and clamped.

        Raises UserError for what are no images.
        """
        images = []
        for part in latents.split(self.batch):
            z = unscaled(part.to(self.device).float(), self.scale, self.shift)
            decoded = self._decode(z)
            if decoded.ndim != 4 or len(decoded) != len(z) or decoded.shape[1] not in (1, 3):
                raise UserError(
                    f"decoder {self.specification}: of latents {tuple(z.shape)} it made "
                    f"{tuple(decoded.shape)}; images are ({len(z)}, 3, height, width)"
                )
            images.append(decoded)
        return _levels(torch.cat(images), self.pixel_range)


def _levels(pixels: Tensor, pixel_range: tuple[float, float]) -> Tensor:
    """Numbers (N,C,H,W) of a range to uint8 images (N,H,W,C) on the CPU."""
    black, white = pixel_range
    return to_uint8((pixels.float() - black) / (white - black) * 2 - 1).cpu()


def _load(path_or_id: str) -> Any:
    """Raises UserError naming what is missing."""
    try:
        import diffusers
    except ImportError:
        raise UserError(
            f"the autoencoder {path_or_id} needs diffusers, which is not installed; run: "
            'pip install "diffmoe[vae]"'
        ) from None
    where: dict[str, str] = {}
    name = path_or_id
    if is_code(name) and not os.path.isdir(name):
        raise UserError(
            f"the autoencoder {name} cannot be loaded: it is a program, which no data and no model "
            f"may start; if you trust it, give what decodes its latents as --decoder {name}"
        )
    if not os.path.isdir(path_or_id) and path_or_id.count("/") == 2 and path_or_id[0] != "/":
        name, _, where["subfolder"] = path_or_id.rpartition("/")
    try:
        config = diffusers.AutoencoderKL.load_config(name, **where)
        kind = config.get("_class_name", "AutoencoderKL")
        if not hasattr(diffusers, kind) or "Autoencoder" not in kind:
            raise ValueError(f"diffusers {diffusers.__version__} has no autoencoder {kind}")
        return getattr(diffusers, kind).from_pretrained(name, low_cpu_mem_usage=False, **where)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the autoencoder {path_or_id} cannot be loaded ({error}); give a folder or hub id of "
            "an autoencoder of diffusers, or what decodes its latents as --decoder"
        ) from error


Autoencoder = PixelAutoencoder | DiffusersAutoencoder | NamedDecoder | NoDecoder


def load_autoencoder(
    autoencoder: str,
    scale: Numbers = 1.0,
    shift: Numbers = 0.0,
    device: str | torch.device = "cpu",
    pixel_range: tuple[float, float] = (-1.0, 1.0),
) -> Autoencoder:
    """The autoencoder for the values of a manifest's fields of the same names."""
    if autoencoder == "identity":
        return PixelAutoencoder(scale, shift)
    return DiffusersAutoencoder(autoencoder, scale, shift, device, pixel_range=pixel_range)


def autoencoder_of(
    latents: LatentSpec, device: str | torch.device = "cpu", decoder: str | None = None
) -> Autoencoder:
    """What decodes such latents: the autoencoder that they name, or the decoder of the user.

    decoder: also the name of an autoencoder. Code that it names is run: it comes from the command
    line, never from a file. Raises UserError if it cannot be loaded.
    """
    given = (latents.scale, latents.shift, device)
    if decoder is not None and is_code(decoder):
        return NamedDecoder(decoder, *given, pixel_range=latents.pixel_range)
    return load_autoencoder(decoder or latents.autoencoder, *given, latents.pixel_range)


def is_code(decoder: str) -> bool:
    """Whether it is a program to run, and no autoencoder of diffusers."""
    return decoder.endswith(SCRIPTS) or _FUNCTION.fullmatch(decoder) is not None


def why_missing(name: str) -> str | None:
    """Why the autoencoder of this name cannot be opened here; None if nothing speaks against it.

    A short look: nothing is loaded or downloaded.
    """
    if name == "identity":
        return None
    if is_code(name) and not os.path.isdir(name):
        return "it is a program, which runs only if you name it"
    if find_spec("diffusers") is None:
        return 'diffusers is not installed: pip install "diffmoe[vae]"'
    if os.path.isabs(name) and not os.path.isdir(name):
        return "the folder is not on this machine"
    return None


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
