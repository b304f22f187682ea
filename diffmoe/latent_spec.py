"""What latents are, as data manifests, checkpoints and exported models record it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from diffmoe.errors import UserError

# One number, or one for each channel.
Numbers = float | list[float]


class LatentSpec(BaseModel):
    """What the numbers are that a network works on: (z - shift) * scale of an autoencoder's z.

    shape: (C, H, W). scale, shift: one number, or one for each channel.
    autoencoder: a hub id or a folder; "identity" where the latents are pixels; "vae" in an exported
    folder, where the autoencoder's files are in the subfolder of that name.
    pixel_range: the numbers that the autoencoder takes for black and white.
    source: a description of the data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    shape: tuple[int, int, int]
    scale: Numbers = 1.0
    shift: Numbers = 0.0
    autoencoder: str = "identity"
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    source: str = "unknown"

    @model_validator(mode="after")
    def _one_per_channel(self) -> "LatentSpec":
        for name in ("scale", "shift"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.shape[0]:
                raise ValueError(f"{name} has {len(value)} numbers for {self.shape[0]} channels")
        return self

    @classmethod
    def from_manifest(cls, fields: Any, file: str | Path) -> "LatentSpec":
        """From the fields of a manifest, or those of them that run.json keeps as `latents`.

        Raises UserError naming the file and the field.
        """
        if not isinstance(fields, Mapping):
            raise UserError(f"{file}: latents is not an object of fields")
        try:
            return cls(**{name: fields[name] for name in cls.model_fields if name in fields})
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(map(str, ("latents", *problem["loc"])))
            raise UserError(f"{file}: {name}: {problem['msg']}") from None

    @property
    def makes_gray(self) -> bool:
        """Whether images of these latents have one channel."""
        return self.autoencoder == "identity" and self.shape[0] == 1
