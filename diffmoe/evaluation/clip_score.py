"""CLIP score: similarity of images and their captions, by a CLIP in a local folder."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.evaluation.image_sets import ImageSet, batches, require_rgb
from diffmoe.text.local_models import checksum_of, load_model, load_processor, model_kind


class Clip:
    """A CLIP of transformers. name: of its folder. checksum: of weights and vocabulary.

    Raises UserError if the folder holds another model.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        if model_kind(folder) != "clip":
            raise UserError(f"{folder} is not a CLIP model; give one of transformers")
        self._model = load_model(folder, "CLIPModel", device)
        self._tokenizer = load_processor(folder, "AutoTokenizer")
        self._images = load_processor(folder, "CLIPImageProcessor")
        self._device = device
        config: Any = self._model.config
        self._max_length = config.text_config.max_position_embeddings
        self.name = Path(folder).resolve().name
        self.checksum = checksum_of(self._model, self._tokenizer)

    @torch.inference_mode()
    def scores(self, images: np.ndarray, captions: list[str]) -> Tensor:
        """100 max(cosine, 0) of images and captions (n,) (arXiv 2104.08718). images: uint8."""
        words = self._tokenizer(
            captions,
            padding=True,
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        ).to(self._device)
        pictures = [Image.fromarray(image) for image in images]
        pixels = self._images(images=pictures, return_tensors="pt").pixel_values.to(self._device)
        found = self._model(
            input_ids=words.input_ids, attention_mask=words.attention_mask, pixel_values=pixels
        )
        cosines = torch.cosine_similarity(found.image_embeds, found.text_embeds)
        return 100 * cosines.clamp(min=0).cpu()


def clip_score(images: ImageSet, clip: Clip, batch: int = 50) -> float:
    """The mean score of samples with captions. Raises UserError for other images."""
    captions, scores = images.captions(), []
    for part in batches(images, batch):
        require_rgb(part.images, images.path)
        scores.append(clip.scores(part.images, [captions[label] for label in part.known_labels]))
    return float(torch.cat(scores).mean())
