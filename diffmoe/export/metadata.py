"""config.json of an exported model: what the network is, what its latents are, whence it comes."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffmoe.clock import Clock
from diffmoe.config import Config, DiffusionConfig, ModelConfig, MoEConfig
from diffmoe.errors import UserError
from diffmoe.files import contained, read_json

FILE_NAME = "config.json"
DTypeName = Literal["float32", "bfloat16"]
# No side of a network is longer; a damaged file must not make us count that far.
_LONGEST = 1 << 20

Numbers = float | list[float]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Latents(_Part):
    """What the network's numbers stand for, as a data folder's manifest says it.

    The model works on (z - shift) * scale of the autoencoder's latents z of `shape` (C, H, W).
    autoencoder: a hub id, "identity" where the latents are pixels, or "vae" where its folder lies
    beside config.json. pixel_range: its black and white.
    source: the data, in words.
    """

    shape: tuple[int, int, int]
    scale: Numbers = 1.0
    shift: Numbers = 0.0
    autoencoder: str = "identity"
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    source: str = "unknown"

    @model_validator(mode="after")
    def _per_channel(self) -> "Latents":
        for name in ("scale", "shift"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.shape[0]:
                raise ValueError(f"{name} has {len(value)} numbers for {self.shape[0]} channels")
        return self


class Provenance(_Part):
    """kind: of what was converted. name: of its file or folder. sha256: of the file, or of a
    checkpoint's checksums.json, which holds those of all its files. steps: what was done on the
    way, such as upcycling.
    """

    kind: str
    name: str
    sha256: str | None = None
    steps: tuple[str, ...] = ()


class Metadata(_Part):
    """All of an exported model that is no tensor.

    weights: ema, live, or ema:STD. label_dropout: of its training, None where it is not known; with
    0 the null label was never trained, and guidance has nothing to lead away from.
    """

    format: Literal["diffmoe"] = "diffmoe"
    version: Literal[1] = 1
    dtype: DTypeName = "float32"
    weights: str = Field("ema", pattern=r"^(ema|live|ema:[0-9.]+)$")
    model: ModelConfig
    moe: MoEConfig
    diffusion: DiffusionConfig
    latents: Latents
    class_names: tuple[str, ...] | None = None
    label_dropout: float | None = Field(None, ge=0, le=1)
    clock: Clock | None = None
    provenance: Provenance

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, values: Any) -> Any:
        model = _section(values, "model")
        sections = {"model": model, "model.text": _section(model, "text")}
        sections["moe"] = _section(values, "moe")
        for section, fields in sections.items():
            for name, value in fields.items():
                if isinstance(value, int | float) and not -_LONGEST <= value <= _LONGEST:
                    raise ValueError(f"{section}.{name}={value} is no size of a network")
        return values

    @model_validator(mode="after")
    def _fit(self) -> "Metadata":
        model = self.model
        shape = (model.in_channels, model.input_size, model.input_size)
        if self.latents.shape != shape:
            raise ValueError(f"latents.shape={self.latents.shape}, but the model takes {shape}")
        names = self.class_names
        if names is not None and model.text is None and len(names) != model.num_classes:
            raise ValueError(
                f"class_names has {len(names)} names, model.num_classes is {model.num_classes}"
            )
        return self

    @property
    def config(self) -> Config:
        """A run's configuration with these sections, the others at their defaults."""
        config = Config(model=self.model, moe=self.moe, diffusion=self.diffusion)
        if self.label_dropout is None:
            return config
        return config.replace({"training.label_dropout": self.label_dropout})

    @property
    def calibrated_for(self) -> str:
        """The `weights` of the calibrated thresholds that hold for this model: ema or live."""
        return self.weights.partition(":")[0]

    def replace(self, **changes: Any) -> "Metadata":
        """A validated copy. changes: whole fields."""
        return Metadata.model_validate(self.model_dump() | changes)


def _section(values: Any, name: str) -> dict[str, Any]:
    """A part of what may be anything."""
    section = values.get(name) if isinstance(values, dict) else None
    return section if isinstance(section, dict) else {}


def read_about(folder: Path) -> Metadata:
    """config.json of an exported model. Raises UserError naming the file and the field."""
    file = contained(folder, FILE_NAME)
    return parse_metadata(read_json(file), file)


def parse_metadata(values: Any, file: Path) -> Metadata:
    try:
        return Metadata.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_explain(problem) for problem in error.errors())
        raise UserError(f"{file}: {problems}; convert the model again") from None


def _explain(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"]) or "the file"
    if problem["type"] == "missing":
        return f"{field} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{field} is unknown (was it written by a newer version?)"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{field}={str(problem['input'])[:80]}: {problem['msg']}"
