"""Class accuracy: the share of images that a classifier assigns to the requested class."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from diffmoe.digits.nearest_neighbor import digit_classifier
from diffmoe.errors import UserError
from diffmoe.evaluation.image_sets import ImageSet, batches
from diffmoe.files import sha256_of
from diffmoe.named_code import SCRIPTS, import_function, open_torchscript

# uint8 images (n, H, W, C) to labels (n,).
Classify = Callable[[np.ndarray], np.ndarray]


def load_classifier(
    specification: str, device: str | torch.device = "cpu"
) -> tuple[str, str | None, Classify]:
    """A classifier's name, the SHA-256 of its file if it has one, and itself.

    specification: `digits` (5 nearest neighbors among real MNIST), a TorchScript FILE.pt or
    `package.module:function`; the last two take float images (n, C, H, W) in 0..255 and return
    scores (n, classes). Raises UserError if it cannot be loaded.
    """
    if specification == "digits":
        return specification, None, digit_classifier()
    if specification.endswith(SCRIPTS):
        file, device = Path(specification), torch.device(device)
        network = open_torchscript(file, device)
        return file.stem, sha256_of(file), _by_scores(network, device)
    if ":" in specification:
        function = import_function(specification)
        return specification, None, _by_scores(function, torch.device(device))
    raise UserError(
        f"classifier {specification}: choose digits, a TorchScript FILE.pt or "
        "package.module:function"
    )


def class_accuracy(images: ImageSet, classify: Classify, batch: int = 50) -> float:
    """The share of images whose label the classifier predicts. Raises UserError without labels."""
    right = 0
    for part in batches(images, batch):
        if part.labels is None:
            raise UserError(
                f"{images.path} has no labels for class accuracy; give our samples, an "
                "npz with arr_1, or folders of classes"
            )
        right += int((classify(part.images) == part.labels).sum())
    return right / images.number


def _by_scores(network: Callable, device: torch.device) -> Classify:
    @torch.inference_mode()
    def classify(images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(images.copy()).to(device).permute(0, 3, 1, 2).float()
        return network(pixels).argmax(1).cpu().numpy()

    return classify
