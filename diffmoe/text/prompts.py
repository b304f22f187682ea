"""Prompts of a text model: captions, encoded when they are needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffmoe.conditions import Condition, unconditional
from diffmoe.config import Config
from diffmoe.data.manifest import TextContent
from diffmoe.errors import UserError
from diffmoe.files import cannot_read, read_text
from diffmoe.text.encoders import TextEncoder, open_encoder
from diffmoe.tree import tree_map

NO_PROMPT = (
    "this model draws captions, not classes: give at least one prompt (--prompt, --prompts FILE)"
)


@dataclass(frozen=True)
class Prompts:
    """Captions, which stand for classes: an image's label is the number of its caption.

    negative: a caption that guidance leads away from instead of the null caption.
    """

    encoder: TextEncoder
    captions: tuple[str, ...]
    negative: str | None = None

    def __len__(self) -> int:
        return len(self.captions)


def encoder_of(
    config: Config, path: str | Path | None = None, device: str | torch.device = "cpu"
) -> TextEncoder | None:
    """The encoder of a text model's captions; None for a model of classes.

    path: the folder of a frozen encoder. Raises UserError where it is missing or holds another one.
    """
    if config.model.text is not None:
        return open_encoder(TextContent.of(config.model.text), path, device)
    if path is not None:
        raise UserError(f"text encoder {path}: this model draws classes; leave it out")
    return None


def read_captions(file: str | Path) -> list[str]:
    """The lines of a text file, without empty ones. Raises UserError if it cannot be read."""
    try:
        text = read_text(file, encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"prompts: {cannot_read(file, error)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"prompts {file} cannot be read: {error}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def create_prompts(
    config: Config,
    encoder: TextEncoder | None,
    captions: Sequence[str],
    negative: str | None = None,
) -> Prompts | None:
    """Prompts for a text model, None for one of classes. encoder: of `encoder_of`.

    Raises UserError where the model takes the other kind, and for text that is not valid UTF-8.
    """
    if encoder is not None:
        if not captions:
            raise UserError(NO_PROMPT)
        for caption in (*captions, negative or ""):
            try:
                caption.encode()
            except UnicodeEncodeError:
                raise UserError(f"prompt {caption!a} is not UTF-8") from None
        return Prompts(encoder, tuple(captions), negative)
    if captions or negative is not None:
        raise UserError(
            f"this model draws classes (model.num_classes={config.model.num_classes}) and takes no "
            "prompts; give classes"
        )
    return None


def conditions(
    labels: Sequence[int], config: Config, prompts: Prompts | None, device: torch.device
) -> tuple[Condition, Condition]:
    """The condition of each label, and the one that guidance leads away from."""
    everywhere = torch.ones(len(labels), dtype=torch.bool, device=device)
    classes = config.model.num_classes
    if prompts is None:
        wanted: Condition = torch.tensor(labels, device=device)
        return wanted, unconditional(wanted, everywhere, classes)

    def encoded(captions: list[str]) -> Condition:
        return tree_map(lambda tensor: tensor.to(device), prompts.encoder.encode(captions))

    wanted = encoded([prompts.captions[label] for label in labels])
    if prompts.negative is None:
        return wanted, unconditional(wanted, everywhere, classes)
    return wanted, encoded([prompts.negative] * len(labels))
