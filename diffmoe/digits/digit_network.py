"""A small convolutional classifier of gray digits, trained in half a minute."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPOCHS, BATCH = 30, 64


def fit_digits(shapes: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Train a classifier. Returns a function from uint8 images (n,16,16) to labels (n,).

    shapes, labels: the training set, uint8 (n,16,16) and (n,). As it is small, every epoch rotates,
    shears, scales and shifts each digit slightly. Brightness is normalized. The result is
    deterministic.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Dropout(0.5)),
            nn.Linear(128, 10),
        )
        _fit(network, _bright(shapes), torch.from_numpy(labels).long())
    network.eval()

    @torch.inference_mode()
    def read(images: np.ndarray) -> np.ndarray:
        return network(_bright(images)).argmax(1).numpy()

    return read


def _fit(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            loss = F.cross_entropy(network(_moved(images[part])), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _bright(images: np.ndarray) -> Tensor:
    """Images scaled to (n,1,16,16) with a maximum of 1 each."""
    pixels = torch.from_numpy(images).float()[:, None]
    return pixels / pixels.amax((1, 2, 3), keepdim=True).clamp(min=1)


def _moved(images: Tensor) -> Tensor:
    """Each image with a small random affine transform."""
    n = len(images)
    angle = torch.empty(n).uniform_(-1, 1) * math.radians(12)
    scale, shear = torch.empty(n).uniform_(0.88, 1.12), torch.empty(n).uniform_(-0.15, 0.15)
    shift = torch.empty(2, n).uniform_(-0.12, 0.12)  # in half sides: up to a pixel
    rows = [
        torch.stack([angle.cos() * scale, shear - angle.sin() * scale, shift[0]], 1),
        torch.stack([angle.sin() * scale, angle.cos() * scale, shift[1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
