"""Images from a path in three lines: diffmoe.Pipeline(path)(labels=[207, 360]), or (prompt=...)."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffmoe.capacity.thresholds import set_capacity
from diffmoe.data.autoencoders import autoencoder_of
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.export.open import locate, open_network, weights_of
from diffmoe.parallel.device import default_device
from diffmoe.sampling.classes import label_numbers
from diffmoe.sampling.images import sample_images
from diffmoe.sampling.latents import fitted
from diffmoe.text.prompts import asked, encoder_of


class Pipeline:
    """A model with its autoencoder, ready to make images."""

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = torch.float32,
        weights: str = "ema",
        text_encoder: str | Path | None = None,
        verify: bool = True,
    ) -> None:
        """path: an exported folder, a run's folder or a checkpoint.

        device: default the GPU where there is one. dtype: of the network's parameters, as in
        `load`. weights: ema or live, of a run or checkpoint. text_encoder: the folder of the frozen
        one that a text model was trained with; a model that reads bytes needs none. verify: hold
        the files against their checksums; each is read once per machine, and again when it changed.
        """
        device = torch.device(device or default_device())
        self.folder = locate(path)
        self.weights = weights_of(self.folder, weights)
        snapshot = open_network(self.folder, weights, device=device, dtype=dtype, verify=verify)
        self.network, self.config = snapshot.network, snapshot.config
        self.class_names: Sequence[str] = snapshot.class_names
        self.autoencoder = autoencoder_of(snapshot.latents, device)
        self.encoder = encoder_of(self.config, text_encoder, device)

    def __call__(
        self,
        labels: Sequence[int | str] | None = None,
        seed: int = 0,
        steps: int = 50,
        guidance: float | None = None,
        capacity: float | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        batch: int = 50,
        **settings: Any,
    ) -> list[Image.Image]:
        """An image per label: a class number, or a name where the model knows the names; of a text
        model an image per prompt.

        Image k of a seed is the same in any batch. guidance: None: 1.5, or 1 of a model trained
        without label dropout, which warns. capacity: experts that an average token meets; None: as
        in training; others must be calibrated (tools/calibrate.py), and a calibration with other
        settings warns of the capacity met. batch: at a time. settings: more fields of
        diffmoe.diffusion.settings.SamplingSettings.
        """
        captions = [prompt] if isinstance(prompt, str) else prompt or ()
        prompts = asked(self.config, self.encoder, captions, negative_prompt)
        if (prompts is None) == (labels is None):
            raise UserError("give labels=[...] to a model of classes, prompt=... to a text model")
        if prompts:
            numbers: Sequence[int] = range(len(prompts))
        else:
            numbers = label_numbers(labels, self.class_names, self.folder)
        calibrated = set_capacity(self.network, self.folder, None, capacity, self.weights)
        chosen = SamplingSettings(steps=steps, guidance=guidance, seed=seed, **settings)
        chosen = fitted(chosen, self.config, prompts, _warn)
        images, met = sample_images(
            self.network,
            self.config,
            self.autoencoder.decode,
            numbers,
            range(len(numbers)),
            chosen,
            prompts=prompts,
            batch=batch,
        )
        differing = calibrated and calibrated.differs(chosen, self.config, met.average)
        if differing:
            _warn(differing)
        return [Image.fromarray(image.squeeze(-1).numpy()) for image in images]


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)  # of whoever called the pipeline
