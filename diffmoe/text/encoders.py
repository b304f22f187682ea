"""Text encoders: what turns captions into the features that a model is conditioned on."""

from pathlib import Path
from typing import Protocol

import torch

from diffmoe.conditions import Text
from diffmoe.config import BYTES
from diffmoe.data.captions import CAPTION_BYTES
from diffmoe.data.collate import Caption, byte_tokens, padded
from diffmoe.data.manifest import TextContent
from diffmoe.errors import UserError
from diffmoe.text.local_models import checksum_of, load_model, load_preparation, model_kind

_MODELS = {"t5": "T5EncoderModel", "clip": "CLIPTextModel"}
_T5_TOKENS = 128  # where no length is given: T5 itself knows no end


class TextEncoder(Protocol):
    """content: what its features are, as the manifest of data and a model's configuration say."""

    content: TextContent

    def encode(self, captions: list[str]) -> Text:
        """On the CPU, padded to content.length; what a caption has beyond that is cut off."""


class ByteEncoder:
    """Captions as their UTF-8 bytes, for models that learn to read by themselves."""

    def __init__(self, length: int = CAPTION_BYTES) -> None:
        self.content = TextContent(encoder=BYTES, length=length)

    def encode(self, captions: list[str]) -> Text:
        length = self.content.length
        return padded([Caption(byte_tokens(line, length)) for line in captions], self.content)


class TransformersEncoder:
    """The encoder of a T5, or CLIP's text model with its pooled vector, whichever a folder holds.

    length: tokens of a caption at most, begin and end included; None: CLIP's own, 128 of T5.
    Its name in `content` is made of the weights and the vocabulary: the folder may be moved and
    renamed, and features of other weights are not taken for its own.
    """

    def __init__(
        self, folder: str | Path, length: int | None = None, device: str | torch.device = "cpu"
    ) -> None:
        kind, self._device = model_kind(folder), device
        self._model = load_model(folder, _MODELS[kind], device)
        self._tokenizer = load_preparation(folder, "AutoTokenizer")
        self._tokenizer.padding_side = "right"  # else places would depend on the batch
        width = self._model.config.hidden_size
        longest = self._model.config.max_position_embeddings if kind == "clip" else None
        if longest is not None and length is not None and length > longest:
            raise UserError(f"{length} tokens a caption, but the CLIP of {folder} takes {longest}")
        self.content = TextContent(
            encoder=f"{kind}-{checksum_of(self._model, self._tokenizer)}",
            length=length or longest or _T5_TOKENS,
            width=width,
            pooled=width if kind == "clip" else 0,
        )

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> Text:
        words = self._tokenizer(
            captions,
            padding=True,
            truncation=True,
            max_length=self.content.length,
            return_tensors="pt",
        ).to(self._device)
        found = self._model(input_ids=words.input_ids, attention_mask=words.attention_mask)
        features_BLD = found.last_hidden_state.cpu().numpy()
        mask_BL = words.attention_mask.bool().cpu().numpy()
        pooled: list = [None] * len(captions)
        if self.content.pooled:
            pooled = list(found.pooler_output.cpu().numpy())
        rows = zip(features_BLD, mask_BL, pooled, strict=True)
        return padded([Caption(x[mask], vector) for x, mask, vector in rows], self.content)


def open_encoder(
    content: TextContent, path: str | Path | None, device: str | torch.device = "cpu"
) -> TextEncoder:
    """The encoder that gives `content`. Raises UserError if the folder at `path` holds another.

    path: None for bytes, which need no folder.
    """
    if content.encoder == BYTES:
        if path is not None:
            raise UserError(f"text encoder {path}: the model reads bytes by itself; leave it out")
        return ByteEncoder(content.length)
    if path is None:
        raise UserError(
            f"captions need the text encoder {content.encoder} that the model was trained with; "
            "give its folder (--text-encoder DIR, evaluation.text_encoder=DIR)"
        )
    encoder = TransformersEncoder(path, content.length, device)
    if encoder.content != content:
        raise UserError(
            f"text encoder {path} gives {_told(encoder.content)}, but the model was trained with "
            f"{_told(content)}; give the folder of that one"
        )
    return encoder


def _told(content: TextContent) -> str:
    return ", ".join(f"{name}={value}" for name, value in content)
