"""config.json of an exported model: its network, its latents, and where it comes from."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffmoe.clock import Clock
from diffmoe.config import Config, DiffusionConfig, ModelConfig, MoEConfig
from diffmoe.errors import UserError, describe_problem
from diffmoe.files import contained, read_json
from diffmoe.latent_spec import LatentSpec

FILE_NAME = "config.json"
DTypeName = Literal["float32", "bfloat16"]
# No dimension of a network is larger; a damaged file must not make us count that far.
_LONGEST = 1 << 20


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Provenance(_Part):
    """Where an exported model comes from.

    kind: of the source. name: of its file or folder. sha256: of the file, or of a checkpoint's
    checksums.json, which holds those of all its files. steps: what was done to it, such as
    upcycling.
    """

    kind: str
    name: str
    sha256: str | None = None
    steps: tuple[str, ...] = ()


class Metadata(_Part):
    """Everything of an exported model that is not a tensor.

    weights: ema, live, or ema:STD. label_dropout: of its training, None if unknown; with 0 the null
    label was never trained, so the model cannot be guided.
    """

    format: Literal["diffmoe"] = "diffmoe"
    version: Literal[1] = 1
    dtype: DTypeName = "float32"
    weights: str = Field("ema", pattern=r"^(ema|live|ema:[0-9.]+)$")
    model: ModelConfig
    moe: MoEConfig
    diffusion: DiffusionConfig
    latents: LatentSpec
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
                numbers = value if isinstance(value, list) else [value]
                if any(
                    isinstance(one, int | float) and not -_LONGEST <= one <= _LONGEST
                    for one in numbers
                ):
                    raise ValueError(f"{section}.{name}={value} is not the size of a network")
        return values

    @model_validator(mode="after")
    def _fit(self) -> "Metadata":
        model = self.model
        shape = model.latent_shape
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
        """A run's configuration with these sections; the others have their defaults."""
        sections = {"model": self.model, "moe": self.moe, "diffusion": self.diffusion}
        config = Config.model_validate(sections)
        if self.label_dropout is None:
            return config
        return config.replace({"training.label_dropout": self.label_dropout})

    @property
    def guidance(self) -> float:
        """What samples take where nobody says another: 1 if the model cannot be guided."""
        from diffmoe.diffusion.settings import GUIDANCE  # a network alone needs no sampler

        return 1.0 if self.label_dropout == 0 else GUIDANCE

    @property
    def calibrated_for(self) -> str:
        """Which weights its calibrated thresholds are of: ema or live."""
        return self.weights.partition(":")[0]

    def replace(self, **changes: Any) -> "Metadata":
        """A validated copy. changes: whole fields."""
        return Metadata.model_validate(self.model_dump() | changes)


def _section(values: Any, name: str) -> dict[str, Any]:
    """A section, or an empty one if there is none in whatever `values` is."""
    section = values.get(name) if isinstance(values, dict) else None
    return section if isinstance(section, dict) else {}


def read_metadata(folder: Path) -> Metadata:
    """config.json of an exported model. Raises UserError naming the file and the field."""
    file = contained(folder, FILE_NAME)
    return parse_metadata(read_json(file), file)


def parse_metadata(values: Any, file: Path) -> Metadata:
    """Validate. Raises UserError naming `file` and the fields."""
    try:
        return Metadata.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(describe_problem(problem) for problem in error.errors())
        raise UserError(f"{file}: {problems}; convert the model again") from None
