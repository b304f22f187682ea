"""CLIP score: how near an image is to its caption, to a CLIP of a local folder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.evaluation.image_sets import ImageSet, batches, require_rgb
from diffmoe.text.local_models import checksum_of, load_model, load_processor, model_kind


class Clip:
    """name: of its folder. checksum: of weights and vocabulary."""

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        if model_kind(folder) != "clip":
            raise UserError(f"{folder} is no CLIP; give a folder of transformers' CLIPModel")
        self._model = load_model(folder, "CLIPModel", device)
        self._tokenizer = load_processor(folder, "AutoTokenizer")
        self._images = load_processor(folder, "CLIPImageProcessor")
        self._device = device
        self.name = Path(folder).resolve().name
        self.checksum = checksum_of(self._model, self._tokenizer)

    @torch.inference_mode()
    def scores(self, images: np.ndarray, captions: list[str]) -> Tensor:
        """100 max(cosine, 0) of each uint8 image (n,H,W,3) and its caption: (n,)."""
        words = self._tokenizer(
            captions,
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
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
    """The mean over samples of ours with captions. Raises UserError for other images."""
    captions, scores = images.captions(), []
    for part in batches(images, batch):
        require_rgb(part.images, images.about["path"])
        scores.append(clip.scores(part.images, [captions[label] for label in part.labels]))
    return float(torch.cat(scores).mean())
