"""The experts and who takes which token."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from diffmoe.config.section import Section

# The gates of families that are not softmax's, as their papers have them.
_GATES = {"race": "identity", "promoe": "identity", "dsmoe": "sigmoid"}


class MoEConfig(Section):
    """The feed-forward of the MoE blocks."""

    type: Literal[
        "diffmoe", "expert_choice", "token_choice", "race", "promoe", "dsmoe", "dense"
    ] = Field("diffmoe", description="family of routing, docs/routing.md; dense: no experts")
    experts: int = Field(16, ge=1, description="E: of one MoE block")
    every_block: bool = Field(False, description="MoE in every block, not only in 1, 3, 5, ...")
    capacity: float = Field(
        1.0, gt=0, description="C: an expert takes K = S * C / E tokens; race: S * C pairs"
    )
    capacity_rounding: Literal["exact", "release"] = Field(
        "exact", description="of K, down; release: in floats as the paper's code, at times one less"
    )
    activation: Literal["gelu", "swiglu"] = Field("gelu", description="of routed experts")
    expert_ratio: float = Field(4.0, gt=0, description="hidden size of one expert over width")
    shared_expert_ratio: float = Field(
        0.0, ge=0, description="hidden size over width of an expert that sees every token; 0: none"
    )
    shared_expert_activation: Literal["gelu", "swiglu"] = Field(
        "gelu", description="of the expert that sees every token"
    )
    router_init_std: float = Field(0.006, gt=0, description="of the router's normal start")
    router_input: Literal["modulated", "plain", "plain_with_time"] = Field(
        "modulated",
        description="tokens as the experts see them, before the condition modulates them, or "
        "those with a term of the timestep alone",
    )
    gate: Literal["softmax", "sigmoid", "identity"] = Field(
        "softmax",
        description="of the router's logits: scores to select by, and gates to weigh by; race and "
        "promoe: identity, dsmoe: sigmoid, unless given",
    )
    gate_scale: Annotated[float, Field(gt=0)] | Literal["experts"] = Field(
        1.0, description="gates are scores times this; experts: times their number"
    )
    expert_init_std: float | None = Field(
        None, gt=0, description="of experts' normal start, such as 0.006; none: Xavier's uniform"
    )
    token_pool: Literal["micro_batch", "expert_parallel", "global"] = Field(
        "micro_batch", description="whose tokens an expert chooses from in training (diffmoe, race)"
    )
    inference: Literal["per_token", "pooled", "static"] = Field(
        "per_token",
        description="predicted capacity, whatever else is in the batch; as many, but the batch's "
        "best; K tokens as in training (diffmoe)",
    )
    capacity_loss_weight: float = Field(1.0, ge=0, description="of the capacity predictor's loss")
    capacity_loss_reduction: Literal["sum", "mean"] = Field("sum", description="over MoE layers")
    threshold_ema: float = Field(0.95, ge=0, lt=1, description="alpha of Eq. 17")
    top_k: int = Field(1, ge=1, description="experts per token (token_choice, promoe, dsmoe)")
    aux_loss_weight: float = Field(0.01, ge=0, description="load balancing (token_choice)")
    similarity_loss_weight: float = Field(1e-4, ge=0, description="router similarity (race)")
    target_loss_weight: float = Field(
        0.0, ge=0, description="MoE layers predict the objective's target, too; paper 0.01 (race)"
    )
    contrastive_loss_weight: float = Field(1.0, ge=0, description="of prototypes (promoe)")
    contrastive_temperature: float = Field(0.07, gt=0, description="of that loss (promoe)")
    balance_rate: float = Field(1e-3, ge=0, description="step of the selection bias (dsmoe)")
    z_loss_weight: float = Field(0.0, ge=0, description="router z-loss, any family")

    @model_validator(mode="before")
    @classmethod
    def _gate_of_family(cls, values: Any) -> Any:
        if isinstance(values, dict) and "gate" not in values and values.get("type") in _GATES:
            return values | {"gate": _GATES[values["type"]]}
        return values

    @property
    def loss_weights(self) -> dict[str, float]:
        """Of what MoE layers may add to the loss, by its name in LayerRouting.losses."""
        return {
            "capacity": self.capacity_loss_weight,
            "balance": self.aux_loss_weight,
            "similarity": self.similarity_loss_weight,
            "contrastive": self.contrastive_loss_weight,
            "z": self.z_loss_weight,
        }

    @property
    def chosen_by_tokens(self) -> bool:
        """Whether each token takes top_k experts, instead of experts their share of C."""
        return self.type in ("token_choice", "promoe", "dsmoe")

    @property
    def gate_factor(self) -> float:
        """gate_scale as a number."""
        return float(self.experts if self.gate_scale == "experts" else self.gate_scale)

    @model_validator(mode="after")
    def _experts(self) -> "MoEConfig":
        if self.type != "dense" and self.capacity > self.experts:
            raise ValueError(
                f"moe.capacity={self.capacity} is more than moe.experts={self.experts}: every "
                "expert would take every token already at that number"
            )
        if self.top_k > self.experts:
            raise ValueError(f"moe.top_k={self.top_k} is more than moe.experts={self.experts}")
        if self.type == "dsmoe" and self.gate == "identity" and self.top_k > 1:
            raise ValueError(
                "moe.gate=identity: moe.type=dsmoe divides a token's scores by their sum, which "
                "could be 0; choose sigmoid or softmax"
            )
        if self.target_loss_weight and self.type != "race":
            raise ValueError(
                f"moe.target_loss_weight={self.target_loss_weight} belongs to moe.type=race; "
                f"moe.type={self.type} has no head that predicts the target, set it 0"
            )
        if self.token_pool != "micro_batch" and self.type not in ("diffmoe", "race"):
            raise ValueError(
                f"moe.token_pool={self.token_pool} belongs to moe.type=diffmoe and race; "
                f"moe.type={self.type} has no pool over ranks, leave token_pool at micro_batch"
            )
        return self
