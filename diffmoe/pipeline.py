"""Images from a path in three lines: diffmoe.Pipeline(path)(labels=[207, 360]), or (prompt=...)."""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from diffmoe.diffusion.settings import PREVIEW_STEPS, SamplingSettings
from diffmoe.errors import UserError
from diffmoe.export.exported_model import is_exported
from diffmoe.parallel.device import default_device, default_dtype
from diffmoe.sampling.classes import label_numbers
from diffmoe.sampling.sampler import Sampler
from diffmoe.text.prompts import create_prompts, encoder_of

if TYPE_CHECKING:
    from diffmoe.export.sources import Source


class Pipeline:
    """A model with its autoencoder, ready to make images.

    An image has the height and width of its latents, times what the autoencoder upsamples by.

    >>> import diffmoe
    >>> pipeline = diffmoe.Pipeline("exported/mnist")
    >>> images = pipeline(labels=[2, 7, 7], seed=0, steps=2, guidance=1.5)
    >>> [(image.size, image.mode) for image in images]
    [((28, 28), 'L'), ((28, 28), 'L'), ((28, 28), 'L')]
    """

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

        >>> import diffmoe
        >>> pipeline = diffmoe.Pipeline.from_pretrained("owner/digits", device="cpu")
        >>> pipeline.config.model.num_classes
        10
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

        >>> import diffmoe
        >>> pipeline = diffmoe.Pipeline("exported/mnist")
        >>> image, = pipeline("seven", steps=4, sampler="heun", guidance_interval=(0.2, 0.9))
        >>> image.size
        (28, 28)
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

    def save_pretrained(
        self, folder: str | Path, dtype: str = "float32", diffusers: bool = False
    ) -> Path:
        """Write the model as an exported folder, atomically. Returns the folder.

        folder: must not exist. dtype: float32 or bfloat16, of the stored parameters. diffusers:
        with the code by which diffusers opens it, too. Its tensors are those of the files that
        were opened, not rounded to what the network computes in; a decoder that was named is no
        part of it. Raises UserError where they are damaged, where the network was changed since or
        holds adapters, and as `export.writing.write_exported`.

        >>> import diffmoe
        >>> saved = diffmoe.Pipeline("exported/mnist").save_pretrained("exported/half", "bfloat16")
        >>> sorted(file.name for file in saved.iterdir())
        ['README.md', 'checksums.json', 'config.json', 'model.safetensors']
        """
        from diffmoe.export.writing import write_exported

        with self._source() as source:
            written = write_exported(source, Path(folder), dtype, diffusers=diffusers)
        for note in written.notes:
            if note.startswith("warning: "):
                warnings.warn(note.removeprefix("warning: "), stacklevel=2)
        return written.path

    def push_to_hub(
        self, name: str, license: str | None = None, private: bool = False, **options: Any
    ) -> str:
        """Upload the model to the Hugging Face hub in one commit. Returns the commit's address.

        name: OWNER/NAME, created if need be. license: such as "mit"; None: the one in the card of
        an exported folder. private: of a new repository. options: of `save_pretrained`; without
        any, an exported folder is uploaded as it is. Raises UserError as that does, where there is
        no license, and where the hub refuses.

        >>> import diffmoe
        >>> pipeline = diffmoe.Pipeline("exported/mnist")
        >>> pipeline.push_to_hub("owner/digits", license="mit")
        'http.../owner/digits/commit/...'
        """
        from diffmoe.export.hub import publish

        if not options and is_exported(self.folder):
            with self._source() as source:
                for tensor in source.shapes:
                    source.read(tensor)
            return publish(self.folder, name, license, private)
        if license is None:
            raise UserError(f'{name}: the model has no license yet; give one, license="apache-2.0"')
        with tempfile.TemporaryDirectory() as folder:
            saved = self.save_pretrained(Path(folder) / "model", **options)
            return publish(saved, name, license, private)

    @contextmanager
    def _source(self) -> "Iterator[Source]":
        """What was opened; reading a tensor that the network no longer has raises UserError."""
        from diffmoe.export.sources import checkpoint_source, exported_source

        adapters = self.sampler.model.adapters
        if adapters is not None:
            raise UserError(
                f"the adapters {adapters} are merged into {self.folder} here, and no file holds "
                "that; export the run that trained them (tools/convert_checkpoint.py RUN OUT)"
            )
        exported = is_exported(self.folder)
        held = self.network.state_dict()
        with (
            exported_source(self.folder)
            if exported
            else checkpoint_source(self.folder, self.weights)
        ) as source:

            def read(name: str) -> Tensor:
                tensor = source.read(name)
                if not torch.equal(tensor.to(held[name].dtype), held[name].cpu()):
                    raise UserError(
                        f"{name} was changed since {self.folder} was opened; a pipeline saves what "
                        "it has opened, so train from there instead (training.init)"
                    )
                return tensor

            yield replace(source, read=read)
