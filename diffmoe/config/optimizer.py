"""The optimizer, its rates and its schedule."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from diffmoe.config.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class MuonConfig(Section):
    """Muon of the blocks' matrices, where optimizer.type is muon (docs/training.md)."""

    learning_rate: float | None = Field(
        None, gt=0, description="after the warm-up; none: optimizer.learning_rate"
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="Nesterov's")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, of these matrices; 0: off")
    scale: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw",
        description="of an update: 0.2 sqrt(max(in, out)), for AdamW's rates, or "
        "sqrt(max(1, out / in)), for about ten times those",
    )
    newton_schulz: Literal["standard", "gram"] = Field(
        "standard", description="gram: the same with a third fewer operations on 1:4 matrices"
    )
    steps: int = Field(5, ge=1, le=20, description="of Newton-Schulz")


Multiplier = Annotated[float, Field(gt=0)]


class RateMultipliers(Section):
    """What the learning rates are multiplied by, by the role of a parameter (docs/training.md)."""

    embedding: Multiplier = Field(1.0, description="patches, times and labels")
    text: Multiplier = Field(1.0, description="captions: projections, the encoder of bytes")
    attention: Multiplier = Field(1.0, description="self- and cross-attention")
    mlp: Multiplier = Field(1.0, description="dense MLPs, shared and unconditional experts")
    experts: Multiplier = Field(1.0, description="those that tokens are routed to")
    router: Multiplier = Field(1.0, description="all that scores tokens for experts")
    predictor: Multiplier = Field(1.0, description="capacity predictors")
    modulation: Multiplier = Field(1.0, description="adaLN, of the last layer, too")
    final: Multiplier = Field(1.0, description="the last layer, and race's heads for the target")
    projector: Multiplier = Field(1.0, description="of alignment")


class OptimizerConfig(Section):
    """The optimizer and its schedule."""

    type: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: of the blocks' matrices, beside AdamW for all else"
    )
    learning_rate: float = Field(1e-4, gt=0, description="after the warm-up")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay of the two moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="decoupled, of AdamW's matrices, no embeddings, routers or biases; 0: off",
    )
    gradient_clipping: float = Field(0.0, ge=0, description="largest gradient norm; 0: off")
    schedule: Literal["constant", "cosine", "warmup_stable_decay"] = Field(
        "constant", description="of the learning rate; all but constant: to 0 at total_samples"
    )
    warmup_samples: int = Field(0, ge=0, description="of a rate that rises from 0; 0: no warm-up")
    decay_samples: int = Field(
        0, ge=0, description="the last ones, of a rate that falls (warmup_stable_decay)"
    )
    rate_multipliers: RateMultipliers = RateMultipliers()
    muon: MuonConfig = MuonConfig()

    @model_validator(mode="after")
    def _settings_of_another(self) -> "OptimizerConfig":
        if self.type != "muon" and self.muon != MuonConfig():
            changed = next(
                name
                for name in MuonConfig.model_fields
                if getattr(self.muon, name) != getattr(MuonConfig(), name)
            )
            raise ValueError(
                f"optimizer.muon.{changed}={getattr(self.muon, changed)} belongs to "
                f"optimizer.type=muon; optimizer.type={self.type} has no such setting"
            )
        decays = self.schedule == "warmup_stable_decay"
        if decays != bool(self.decay_samples):
            raise ValueError(
                f"optimizer.decay_samples={self.decay_samples} with optimizer.schedule="
                f"{self.schedule}: warmup_stable_decay needs them, such as a fifth of "
                "training.total_samples, and no other schedule has them"
            )
        return self
