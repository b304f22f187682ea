"""Text encoders: from captions to the features that a model is conditioned on."""

from pathlib import Path
from typing import Protocol

import torch

from diffmoe.conditions import Text
from diffmoe.config import BYTES
from diffmoe.data.captions import Caption, byte_tokens, pad_captions
from diffmoe.data.manifest import CAPTION_BYTES, TextContent
from diffmoe.errors import UserError
from diffmoe.text.local_models import checksum_of, load_model, load_processor, model_kind

_MODELS = {"t5": "T5EncoderModel", "clip": "CLIPTextModel"}
_T5_TOKENS = 128  # default length: T5 itself has no limit


class TextEncoder(Protocol):
    """content: describes its features, as a manifest or a model's configuration does."""

    content: TextContent

    def encode(self, captions: list[str]) -> Text:
        """Captions as one batch on the CPU, padded or truncated to content.length tokens."""


class ByteTokenizer:
    """Captions as UTF-8 bytes, for models that learn their own encoder (models/byte_encoder.py)."""

    def __init__(self, length: int = CAPTION_BYTES) -> None:
        self.content = TextContent(encoder=BYTES, length=length)

    def encode(self, captions: list[str]) -> Text:
        length = self.content.length
        return pad_captions([Caption(byte_tokens(line, length)) for line in captions], self.content)


class TransformersEncoder:
    """A folder's T5 encoder, or its CLIP text model with the pooled vector.

    length: most tokens of a caption, including begin and end; None: 128 for T5, CLIP's own limit.
    Its name in `content` is a checksum of the weights and the vocabulary: the folder may be moved
    or renamed, and features of other weights are recognized as different.

    Raises UserError for a folder without such a model, and for a length that CLIP does not support.
    """

    def __init__(
        self, folder: str | Path, length: int | None = None, device: str | torch.device = "cpu"
    ) -> None:
        kind, self._device = model_kind(folder), device
        self._model = load_model(folder, _MODELS[kind], device)
        self._tokenizer = load_processor(folder, "AutoTokenizer")
        self._tokenizer.padding_side = "right"  # else a token's position would depend on the batch
        width = self._model.config.hidden_size
        longest = self._model.config.max_position_embeddings if kind == "clip" else None
        if longest is not None and length is not None and length > longest:
            raise UserError(
                f"{length} tokens per caption, but the CLIP of {folder} takes {longest}"
            )
        self.content = TextContent(
            encoder=f"{kind}-{checksum_of(self._model, self._tokenizer)}",
            length=length or longest or _T5_TOKENS,
            width=width,
            pooled=width if kind == "clip" else 0,
        )

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> Text:
        tokens = self._tokenizer(
            captions,
            padding=True,
            truncation=True,
            max_length=self.content.length,
            return_tensors="pt",
        ).to(self._device)
        output = self._model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        features_BLD = output.last_hidden_state.cpu().numpy()
        mask_BL = tokens.attention_mask.bool().cpu().numpy()
        pooled: list = [None] * len(captions)
        if self.content.pooled:
            pooled = list(output.pooler_output.cpu().numpy())
        rows = zip(features_BLD, mask_BL, pooled, strict=True)
        return pad_captions([Caption(x[mask], vector) for x, mask, vector in rows], self.content)


def open_encoder(
    content: TextContent, path: str | Path | None, device: str | torch.device = "cpu"
) -> TextEncoder:
    """The encoder that `content` describes. Raises UserError if `path` holds another one.

    path: the encoder's folder; None for bytes.
    """
    if content.encoder == BYTES:
        if path is not None:
            raise UserError(
                f"text encoder {path}: this model reads bytes and needs no encoder; leave it out"
            )
        return ByteTokenizer(content.length)
    if path is None:
        raise UserError(
            f"captions need the text encoder {content.encoder} that the model was trained with; "
            "give its folder (--text-encoder DIR, evaluation.text_encoder=DIR)"
        )
    encoder = TransformersEncoder(path, content.length, device)
    if encoder.content != content:
        raise UserError(
            f"text encoder {path} has {_described(encoder.content)}, but the model was trained "
            f"with {_described(content)}; give the folder of that encoder"
        )
    return encoder


def _described(content: TextContent) -> str:
    return ", ".join(f"{name}={value}" for name, value in content)
