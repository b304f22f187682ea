"""Images from a path in three lines: diffmoe.Pipeline(path)(labels=[207, 360]), or (prompt=...)."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffmoe.diffusion.settings import PREVIEW_STEPS, SamplingSettings
from diffmoe.errors import UserError
from diffmoe.parallel.device import default_device, default_dtype
from diffmoe.sampling.classes import label_numbers
from diffmoe.sampling.sampler import Sampler
from diffmoe.text.prompts import create_prompts, encoder_of


class Pipeline:
    """A model with its autoencoder, ready to make images."""

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        weights: str = "ema",
        text_encoder: str | Path | None = None,
        verify: bool = True,
        decoder: str | None = None,
        adapters: str | Path | None = None,
    ) -> None:
        """path: an exported folder, a run's folder or a checkpoint.

        device: default the GPU where there is one. dtype: fp32 or bf16, of the network's products;
        default bf16 on a GPU, fp32 elsewhere; also float16 or float64, of its parameters, as in
        `load`. weights: ema or live, of a run or checkpoint. text_encoder: the folder of the frozen
        encoder that a text model was trained with; a model that reads bytes needs none. verify:
        compare the files with their checksums; each is read once per machine, and again when it has
        changed. decoder: in place of the model's autoencoder: another of diffusers, a TorchScript
        FILE.pt or package.module:function, which are run. adapters: a folder of those that a LoRA
        run trained on this model.
        """
        device = torch.device(device or default_device())
        dtype = dtype or default_dtype(device)
        self.sampler = Sampler.open(
            path,
            weights,
            device=device,
            dtype=dtype,
            verify=verify,
            with_autoencoder=decoder is None,
            adapters=adapters,
        ).with_decoder(decoder)
        self.network, self.config = self.sampler.network, self.sampler.config
        self.autoencoder = self.sampler.autoencoder
        self.folder, self.weights, *_ = self.sampler.model
        self.class_names = self.sampler.model.class_names
        self.encoder = encoder_of(self.config, text_encoder, device)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, revision: str | None = None, **options: Any
    ) -> "Pipeline":
        """A pipeline of a local path, or of a model `OWNER/NAME` on the Hugging Face hub.

        revision: of the hub's model: a branch, tag or commit. options: as of `Pipeline`. Raises
        UserError where there is neither.
        """
        if not Path(name).exists() and str(name).count("/") == 1:
            from diffmoe.export.hub import fetch

            name = fetch(str(name), revision)
        return cls(name, **options)

    def __call__(
        self,
        labels: Sequence[int | str] | str | None = None,
        seed: int = 0,
        steps: int = PREVIEW_STEPS,
        guidance: float | None = None,
        capacity: float | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        batch: int = 50,
        **settings: Any,
    ) -> list[Image.Image]:
        """An image per label, a class number or name; of a text model an image per prompt.

        labels: a name alone, such as "ship", is that class.

        Image k of a seed is the same in any batch. guidance: None: 1.5, or 1, with a warning, for a
        model trained without label dropout. capacity: experts that an average token meets; None: as
        in training; others must be calibrated (tools/calibrate.py), and where a calibration was
        made with other settings, a warning says which capacity the images met. batch: images at a
        time. settings: more fields of diffmoe.diffusion.settings.SamplingSettings.
        """
        captions = [prompt] if isinstance(prompt, str) else prompt or ()
        prompts = create_prompts(self.config, self.encoder, captions, negative_prompt)
        if (prompts is None) == (labels is None):
            raise UserError("give labels=[...] to a model of classes, prompt=... to a text model")
        if prompts:
            numbers: Sequence[int] = range(len(prompts))
        else:
            numbers = label_numbers(labels, self.class_names, self.folder)
        sampler = replace(self.sampler, prompts=prompts).with_capacity(capacity)
        settings = {"shift": None, **settings}
        chosen = SamplingSettings(steps=steps, guidance=guidance, seed=seed, **settings)
        chosen = sampler.fitted(chosen, lambda note: warnings.warn(note, stacklevel=4))
        made = sampler.images(numbers, chosen, batch=batch)
        note = sampler.calibration_note(chosen, made.capacity)
        if note:
            warnings.warn(note, stacklevel=2)
        return [Image.fromarray(image.squeeze(-1).numpy()) for image in made.images]
