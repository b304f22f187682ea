"""One typed, validated configuration of a run; unknown keys are errors."""

import difflib
import math
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diffmoe.errors import UserError


class _Section(BaseModel):
    # Infinity has a meaning in none of the settings.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# The encoder that a text model trains itself; any other's features come with the shards.
BYTES = "bytes"


class TextConfig(_Section):
    """The captions of a text model, and what encodes them."""

    encoder: str = Field(BYTES, min_length=1, description="bytes: the model's own; else frozen")
    length: int = Field(256, ge=1, description="tokens of a caption at most")
    width: int = Field(ge=1, description="of a token's features")
    pooled: int = Field(0, ge=0, description="width of a frozen encoder's pooled vector; 0: none")
    depth: int = Field(0, ge=0, description="blocks of the encoder of bytes; 0 of a frozen one")

    @model_validator(mode="after")
    def _encoder(self) -> "TextConfig":
        if self.encoder != BYTES:
            if self.depth:
                raise ValueError(
                    f"model.text.depth={self.depth} belongs to model.text.encoder={BYTES}; "
                    f"{self.encoder} is frozen and has made the shards' features, set it 0"
                )
            return self
        if not self.depth:
            raise ValueError(
                f"model.text.depth=0, but model.text.encoder={BYTES} is trained with the model; "
                "set its blocks, such as model.text.depth=4"
            )
        if self.pooled:
            raise ValueError(
                f"model.text.pooled={self.pooled} belongs to a frozen encoder; {BYTES} pools its "
                "own tokens, set it 0"
            )
        if self.width > 64 and self.width % 64:
            raise ValueError(
                f"model.text.width={self.width} is not divisible by 64, the width of a head; "
                f"choose {self.width // 64 * 64} or {(self.width // 64 + 1) * 64}"
            )
        return self


# Of a square, or (height, width).
Size = int | tuple[int, int]


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def show_size(size: Size) -> str:
    """As it is written in a setting: 32, or [32, 48]."""
    return str(size if isinstance(size, int) else list(size))


# Of one sample. What no attention reaches; a damaged file must not make us lay them out.
_MOST_TOKENS = 1 << 18


class ModelConfig(_Section):
    """The DiT backbone."""

    input_size: Size = Field(
        32, description="height and width of the latent; [height, width] of a rectangle"
    )
    in_channels: int = Field(4, ge=1, description="channels of the latent")
    patch_size: int = Field(2, ge=1, description="height and width of a token's square")
    width: int = Field(384, ge=2, description="channels of a token")
    depth: int = Field(12, ge=1, description="blocks")
    heads: int = Field(6, ge=1, description="of attention, per block")
    head_width: int | None = Field(None, ge=1, description="of one head; none: width / heads")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden size of dense MLPs over width")
    mlp_activation: Literal["gelu", "swiglu"] = Field("gelu", description="of dense MLPs")
    num_classes: int = Field(1000, ge=1, description="of the labels; not of a text model")
    learn_sigma: bool = Field(False, description="twice the output channels, as published DiTs")
    qk_norm: bool = Field(False, description="RMS norm of queries and keys in attention")
    rope: bool = Field(False, description="2-D rotary positions in attention")
    text: TextConfig | None = Field(None, description="captions in the place of class labels")

    @property
    def blocks(self) -> int:
        """Of the network, and of the encoder of bytes."""
        return self.depth + (self.text.depth if self.text is not None else 0)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network takes."""
        return (self.in_channels, *sides(self.input_size))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        _, height, width = self.latent_shape
        return height // self.patch_size, width // self.patch_size

    @field_validator("input_size", mode="before")
    @classmethod
    def _height_and_width(cls, value: Any) -> Any:
        sides = value if isinstance(value, list | tuple) else [value]
        if len(sides) > 2 or not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(
                f"model.input_size={value!r} is neither a positive whole number nor [height, width]"
            )
        return tuple(sides) if len(set(sides)) == 2 else sides[0]

    @model_validator(mode="after")
    def _shapes(self) -> "ModelConfig":
        _, height, width = self.latent_shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"model.input_size={show_size(self.input_size)} is not divisible by "
                f"model.patch_size={self.patch_size}; choose {_divisors(math.gcd(height, width))}"
            )
        tokens = math.prod(self.grid)
        if tokens > _MOST_TOKENS:
            raise ValueError(
                f"model.input_size={show_size(self.input_size)} in patches of model.patch_size="
                f"{self.patch_size} makes {tokens:,} tokens; at most {_MOST_TOKENS:,} are taken"
            )
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"model.width={self.width} is not divisible by model.heads={self.heads}; "
                f"choose {_divisors(self.width)}"
            )
        if self.rope and self.width_of_head % 4:
            head = f"model.head_width={self.head_width}"
            if self.head_width is None:
                head = f"model.width={self.width} / model.heads={self.heads}"
            raise ValueError(
                f"model.rope needs a head width divisible by 4, and {head} is {self.width_of_head}"
            )
        if self.width % 4:
            raise ValueError(f"model.width={self.width} must be divisible by 4 (2-D positions)")
        return self

    @property
    def width_of_head(self) -> int:
        """Channels of one attention head."""
        return self.head_width or self.width // self.heads


# The gates of families that are not softmax's, as their papers have them.
_GATES = {"race": "identity", "promoe": "identity", "dsmoe": "sigmoid"}


class MoEConfig(_Section):
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


class DiffusionConfig(_Section):
    """The training objective."""

    objective: Literal["flow", "ddpm"] = Field(
        "flow", description="flow matching, or noise prediction in 1,000 steps"
    )
    timesteps: Literal["uniform", "logit_normal"] = Field("uniform", description="flow only")
    timestep_shift: Annotated[float, Field(ge=1e-3, le=1e3)] | Literal["by_size"] = Field(
        1.0,
        description="above 1 trains and samples more at high noise; by_size: as the latents' size "
        "asks for; flow only",
    )

    @model_validator(mode="after")
    def _timesteps(self) -> "DiffusionConfig":
        for name, plain in (("timesteps", "uniform"), ("timestep_shift", 1.0)):
            if self.objective == "ddpm" and getattr(self, name) != plain:
                raise ValueError(
                    f"diffusion.{name}={getattr(self, name)} belongs to diffusion.objective=flow; "
                    "ddpm draws its timesteps uniformly"
                )
        return self


class DataConfig(_Section):
    """Where the shards are and how they are read."""

    path: str | None = Field(None, description="folder of shards with its manifest.json")
    lanes: int = Field(8, ge=1, description="fixed streams; the number of ranks must divide it")
    workers: int = Field(1, ge=0, description="reader processes per rank")
    max_bad_shards: int = Field(
        0, ge=0, description="unreadable shards that others may stand in for; more stop the run"
    )
    stall_seconds: float = Field(60.0, gt=0, description="without data, before a shard is retried")
    cache: str | None = Field(None, description="folder that keeps shards read from URLs")
    cache_gib: float = Field(0.0, ge=0, description="its limit, the oldest shards go; 0: none")
    # Never written: what allows this machine to run commands comes with no run and no file.
    allow_commands: bool = Field(
        False, exclude=True, description="shards may start programs (pipe:, gs:); command line only"
    )


Beta = Annotated[float, Field(ge=0, lt=1)]


class MuonConfig(_Section):
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


class RateMultipliers(_Section):
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


class OptimizerConfig(_Section):
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
        description="decoupled, of AdamW's matrices but embeddings and routers, no biases; 0: off",
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


# Of an average over the run so far; a plain mean of all steps has 12^-0.5.
RelativeLength = Annotated[float, Field(ge=0.005, lt=12**-0.5)]


class TrainingConfig(_Section):
    """The loop. Every period counts samples seen by the whole run."""

    batch_size: int = Field(256, ge=1, description="samples of one optimizer step, all ranks")
    accumulation: int = Field(1, ge=1, description="micro-batches of one optimizer step")
    total_samples: int = Field(256 * 700_000, ge=1, description="after which the run ends")
    checkpoint_samples: int = Field(256 * 10_000, ge=1, description="between two checkpoints")
    keep_last: int = Field(3, ge=1, description="newest checkpoints to keep; older ones go")
    keep_samples: int | None = Field(
        None, ge=1, description="between two checkpoints that are kept for good; none: no such"
    )
    snapshot_samples: int | None = Field(
        None, ge=1, description="between two folders ema-* that hold the EMA alone; none: no such"
    )
    snapshot_precision: Literal["fp32", "bf16"] = Field("bf16", description="of ema-* folders")
    save_failure: Literal["continue", "stop"] = Field(
        "continue", description="after a save that failed, as on a full disk; the last one stops"
    )
    ema_decay: float | None = Field(
        0.9999, ge=0, lt=1, description="per optimizer step; null: no average, and no cost"
    )
    ema_stds: tuple[RelativeLength, ...] = Field(
        (), description="power-function averages, as 0.05, 0.1; other lengths come from them later"
    )
    init: str | None = Field(
        None, description="model whose weights a fresh run starts from, adapted; none: random ones"
    )
    freeze: tuple[str, ...] = Field(
        (), description="patterns of parameters that stay as they are, as blocks.?.attention.*"
    )
    train_only: tuple[str, ...] = Field(
        (), description="patterns of those that train, all others stay; with LoRA, beside it"
    )
    label_dropout: float = Field(
        0.1, ge=0, le=1, description="share of labels or captions left out, for guidance; 0: none"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the forward and backward pass; masters and moments are fp32"
    )
    activation_checkpointing: bool = Field(
        False, description="compute blocks twice instead of keeping their activations"
    )
    compile: bool = Field(False, description="torch.compile each block: a minute at the start")
    deterministic: bool = Field(
        False, description="on a GPU, too, the same run bit for bit, at some cost; a CPU always is"
    )
    evaluate_every: int | None = Field(
        None, ge=1, description="samples between two evaluations (section evaluation); none: never"
    )
    validate_every: int | None = Field(
        None, ge=1, description="samples between two held-out losses (validation); none: never"
    )

    @model_validator(mode="after")
    def _snapshots(self) -> "TrainingConfig":
        if self.snapshot_samples and self.ema_decay is None and not self.ema_stds:
            raise ValueError(
                f"training.snapshot_samples={self.snapshot_samples} saves the EMA alone, but "
                "training.ema_decay is null and there are no ema_stds; set ema_decay"
            )
        return self

    @model_validator(mode="after")
    def _trained(self) -> "TrainingConfig":
        if self.freeze and self.train_only:
            raise ValueError(
                f"training.freeze={list(self.freeze)} and training.train_only="
                f"{list(self.train_only)} say the same in two ways; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _lengths(self) -> "TrainingConfig":
        if len(set(self.ema_stds)) < len(self.ema_stds):
            raise ValueError(
                f"training.ema_stds={list(self.ema_stds)} lists a length twice; [0.05, 0.1] lets "
                "tools/checkpoint.py reconstruct any other"
            )
        return self


class LoRAConfig(_Section):
    """LoRA: factors of low rank beside weights that stay as training.init has them."""

    rank: int = Field(0, ge=0, le=1 << 12, description="of the factors; 0: no LoRA")
    alpha: float | None = Field(
        None, gt=0, description="their product counts alpha / rank times; none: once"
    )
    targets: tuple[str, ...] = Field(
        ("attention",),
        description="what gets them: attention, mlp (shared experts, too), experts, or patterns of "
        "weights, as blocks.?.attention.qkv.weight",
    )

    @property
    def scale(self) -> float:
        """By what the product of the factors counts."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @model_validator(mode="after")
    def _without_rank(self) -> "LoRAConfig":
        if not self.rank and (self.alpha is not None or self.targets != ("attention",)):
            raise ValueError(
                f"lora.alpha={self.alpha} and lora.targets={list(self.targets)} belong to LoRA, "
                "which is off; set lora.rank, such as lora.rank=8"
            )
        if not self.targets:
            raise ValueError("lora.targets=[] names nothing; take attention, mlp or experts")
        return self


class AlignConfig(_Section):
    """Representation alignment with a frozen encoder's features, docs/alignment.md."""

    block: int | None = Field(
        None, ge=1, description="whose tokens are aligned, the first is 1; none: no alignment"
    )
    projector: Literal["mlp", "conv"] = Field(
        "mlp", description="REPA's three layers; iREPA's 3x3, with spatially normalized features"
    )
    width: int = Field(768, ge=1, le=1 << 20, description="channels of the features in the shards")
    hidden: int = Field(2048, ge=1, description="width of the mlp's two hidden layers")
    weight: float = Field(0.5, gt=0, description="of the loss, minus the mean cosine")
    until_samples: int | None = Field(
        None, ge=1, description="samples of the run after which it ends; none: with the run"
    )

    @property
    def end(self) -> float:
        """Samples of the run that are aligned; 0 without alignment."""
        if self.block is None:
            return 0
        return math.inf if self.until_samples is None else self.until_samples


class ValidationConfig(_Section):
    """The held-out loss of training.validate_every: fixed samples, noise and times."""

    path: str | None = Field(None, description="folder of shards that are never trained on")
    samples: int = Field(2048, ge=1, description="of that folder, of which as many must be there")


class EvaluationConfig(_Section):
    """What training.evaluate_every makes, and what it is held against: a small set, live.

    Figures for a paper come from tools/evaluate.py.
    """

    num_samples: int = Field(1000, ge=2, description="images to make")
    labels: Literal["balanced", "random"] = Field(
        "balanced", description="all classes or prompts in turn, or one drawn for each image"
    )
    sampler: str | None = Field(None, description="none: euler of flow, ddpm of ddpm")
    steps: int = Field(50, ge=1, description="of the sampler")
    guidance: float = Field(1.0, description="scale; 1: none")
    seed: int = Field(0, description="of the noise and the random labels")
    batch: int = Field(50, ge=1, description="images that a rank makes at a time")
    reference: str | None = Field(None, description="as of tools/evaluate.py --reference")
    extractor: str | None = Field(
        None, description="none: the default of tools/evaluate.py; module:name is run"
    )
    classifier: str | None = Field(
        None, description="class accuracy: digits, FILE.pt, module:name, which is run"
    )
    prompts: str | None = Field(None, description="of a text model: file of captions, one a line")
    text_encoder: str | None = Field(None, description="its folder; bytes need none")
    truth: str | None = Field(None, description="as of tools/evaluate.py --truth")


# Elements of a bucket of ZeRO where the DeepSpeed JSON says nothing.
ZERO_BUCKET = 25_000_000


class ParallelConfig(_Section):
    """How the work is spread over ranks."""

    expert_parallel: int = Field(1, ge=1, description="P: ranks that share one set of experts")
    zero_stage: int = Field(1, description="DeepSpeed ZeRO stage, 1 or 2")
    timeout_seconds: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="of a step, before the rank that hangs is named and the run ends; none: 20 "
        "usual steps, at least 300. Set it high for a debugger",
    )


class LoggingConfig(_Section):
    """Metrics go to metrics.jsonl always, and to wandb (offline without a key)."""

    log_samples: int = Field(256 * 50, ge=1, description="between two lines of metrics.jsonl")
    wandb: bool = Field(True, description="log there, too")
    project: str = Field("diffmoe", description="of wandb")


class Config(_Section):
    """A whole run. Two runs with equal Config and data give equal numbers."""

    output: str = Field("runs/default", description="folder of the run")
    seed: int = Field(0, description="of the initial weights, the order of data, noise and dropout")
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    lora: LoRAConfig = LoRAConfig()
    align: AlignConfig = AlignConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    parallel: ParallelConfig = ParallelConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def timestep_shift(self) -> float:
        """diffusion.timestep_shift as a number.

        by_size: the square root of the latents' numbers over 4,096 (RAE, arXiv 2510.11690, after
        2403.03206, Eq. 23): the more numbers agree on an image, the more noise it outlives.
        """
        shift = self.diffusion.timestep_shift
        if shift == "by_size":
            return math.sqrt(math.prod(self.model.latent_shape) / 4096)
        return shift

    @model_validator(mode="after")
    def _cross_checks(self) -> "Config":
        for key, ratio in (
            ("model.mlp_ratio", self.model.mlp_ratio),
            ("moe.expert_ratio", self.moe.expert_ratio),
        ):
            if int(self.model.width * ratio) < 1:
                raise ValueError(
                    f"{key}={ratio} times model.width={self.model.width} leaves no hidden unit; "
                    f"choose at least {1 / self.model.width}"
                )
        if self.align.block is not None and self.align.block > self.model.depth:
            raise ValueError(
                f"align.block={self.align.block} is none of the model.depth={self.model.depth} "
                f"blocks; choose 1 to {self.model.depth}, such as a third of them"
            )
        experts, ranks = self.moe.experts, self.parallel.expert_parallel
        if ranks > 1 and self.moe.type == "dense":
            raise ValueError(
                f"parallel.expert_parallel={ranks} needs experts, but moe.type is dense; set it 1"
            )
        if experts % ranks:
            raise ValueError(
                f"moe.experts={experts} is not divisible by parallel.expert_parallel={ranks}; "
                f"choose {_divisors(experts)}"
            )
        stage = self.parallel.zero_stage
        if stage == 0:
            raise ValueError(
                "parallel.zero_stage=0 clips wrongly with experts (it averages gradient norms over "
                f"ranks that own different ones: expert_parallel={ranks}, gradient_clipping="
                f"{self.optimizer.gradient_clipping}); use stage 1, which costs no more"
            )
        if stage not in (1, 2):
            raise ValueError(
                f"parallel.zero_stage={stage}: DeepSpeed refuses or mis-reduces expert parameters "
                "there; use stage 1 or 2, with more expert_parallel or offload if memory is short"
            )
        optimizer, total = self.optimizer, self.training.total_samples
        if optimizer.warmup_samples + optimizer.decay_samples > total and optimizer.decay_samples:
            raise ValueError(
                f"optimizer.warmup_samples={optimizer.warmup_samples} and optimizer.decay_samples="
                f"{optimizer.decay_samples} are more than training.total_samples={total}; take "
                "fewer"
            )
        evaluation = self.evaluation
        judges = (evaluation.reference, evaluation.classifier, evaluation.truth)
        if self.training.evaluate_every and not any(judges):
            raise ValueError(
                f"training.evaluate_every={self.training.evaluate_every} has nothing to judge by: "
                "set evaluation.reference, evaluation.classifier or evaluation.truth"
            )
        if self.training.validate_every and self.validation.path is None:
            raise ValueError(
                f"training.validate_every={self.training.validate_every} needs validation.path: a "
                "folder of shards that are not trained on"
            )
        batch, lanes = self.training.batch_size, self.data.lanes
        pieces = lanes * self.training.accumulation
        if batch % pieces:
            raise ValueError(
                f"training.batch_size={batch} is not divisible by data.lanes={lanes} times "
                f"training.accumulation={self.training.accumulation}; choose a batch that is a "
                f"multiple of {pieces}, or other lanes or accumulation"
            )
        return self

    @property
    def samples_per_lane(self) -> int:
        """Samples that one optimizer step takes from every lane."""
        return self.training.batch_size // self.data.lanes

    def check_world(self, world: int) -> None:
        """Refuse a number of ranks that the configuration cannot be spread over evenly."""
        lanes, ranks = self.data.lanes, self.parallel.expert_parallel
        if world % ranks:
            raise UserError(
                f"{world} ranks are not divisible by parallel.expert_parallel={ranks}; "
                f"choose {_divisors(world)}, or start a multiple of {ranks} ranks"
            )
        # The batch divides by the lanes, so what the lanes allow the batch allows too.
        if lanes % world:
            raise UserError(
                f"data.lanes={lanes} is not divisible by {world} ranks; start "
                f"{_divisors(lanes)} ranks, or set data.lanes to a multiple of {world}"
            )

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def explained(self) -> str:
        """The same settings as YAML, what each one means in a comment behind it."""
        return "".join(_explained_lines(self, self.model_dump(mode="json"), ""))

    def explained_section(self, name: str) -> str:
        """`explained` of one section. Raises UserError for a name that is none."""
        sections = [one for one, value in self if isinstance(value, _Section)]
        if name not in sections:
            raise UserError(f"no section {name!r}; there are {', '.join(sections)}")
        section, values = getattr(self, name), self.model_dump(mode="json")[name]
        head = f"# {(section.__doc__ or '').splitlines()[0]}\n{name}:\n"
        return head + "".join(_explained_lines(section, values, "  "))

    def replace(self, changes: dict[str, Any]) -> "Config":
        """A validated copy with dotted keys changed, e.g. {"training.precision": "bf16"}."""
        values = self.model_dump(exclude_unset=True)
        if self.data.allow_commands:  # which no dump holds
            set_value(values, "data.allow_commands", True)
        for key, value in changes.items():
            set_value(values, key, value)
        return validated(values, "the configuration")


def set_value(values: dict[str, Any], dotted_key: str, value: Any) -> None:
    *sections, key = dotted_key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{dotted_key}: {section} is a value, not a section")
    values[key] = value


def validated(values: dict[str, Any], source: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(
            "\n".join(f"{source}: {_explain(problem)}" for problem in error.errors())
        ) from None


def _explained_lines(section: _Section, values: dict[str, Any], indent: str) -> Iterator[str]:
    for name, value in values.items():
        field, inner = type(section).model_fields[name], getattr(section, name)
        if isinstance(inner, _Section):
            yield f"\n{indent}# {(inner.__doc__ or '').splitlines()[0]}\n{indent}{name}:\n"
            yield from _explained_lines(inner, value, indent + "  ")
            continue
        # In a list, as that keeps every value on its line: `[VALUE]`.
        shown = yaml.safe_dump([value], default_flow_style=True, width=math.inf)[1:-2]
        setting = f"{indent}{name}: {shown}"
        choices = ""
        if get_origin(field.annotation) is Literal:
            choices = f"({' | '.join(get_args(field.annotation))}) "
        yield f"{setting:<34}  # {choices}{field.description}\n"


def _explain(problem: Any) -> str:
    where = [str(part) for part in problem["loc"]]
    if ".".join(where[:-1]) in setting_names() and not where[-1].isdigit():
        where.pop()  # of a setting that takes several types, the one that pydantic tried
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        section: Any = Config
        for part in problem["loc"][:-1]:
            kind = section.model_fields[part].annotation
            section = next((one for one in get_args(kind) if one is not NoneType), kind)
        known = f"known: {', '.join(section.model_fields)}"
        near = nearest_setting(key)
        meant = f". Did you mean {near}?" if near else ""
        return f"unknown key {key}={problem['input']!r}; {known}{meant}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{key}={problem['input']!r}: {problem['msg']}"


# What others call some settings.
_ALIASES = {
    "lr": "optimizer.learning_rate",
    "wd": "optimizer.weight_decay",
    "hidden_size": "model.width",
    "num_layers": "model.depth",
    "num_heads": "model.heads",
    "num_experts": "moe.experts",
    "output_dir": "output",
    "data_dir": "data.path",
    "data_path": "data.path",
    "epochs": "training.total_samples",
    "max_steps": "training.total_samples",
    "bf16": "training.precision",
}


def setting_names(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All settings, as they are written: section.key."""
    names = []
    for name, field in section.model_fields.items():
        inner = [one for one in (field.annotation, *get_args(field.annotation)) if _is_section(one)]
        names += setting_names(inner[0], f"{prefix}{name}.") if inner else [prefix + name]
    return names


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def nearest_setting(key: str) -> str | None:
    """The setting that somebody who writes `key` has most likely in mind."""
    key, names = key.lower().replace("-", "_"), setting_names()
    last = key.rpartition(".")[2]
    if last in _ALIASES:
        return _ALIASES[last]
    same = [name for name in names if name.rpartition(".")[2] == last]
    close = difflib.get_close_matches(key, same or names, 1, cutoff=0.0 if same else 0.85)
    if not close:
        lasts = {name.rpartition(".")[2]: name for name in reversed(names)}
        close = [lasts[one] for one in difflib.get_close_matches(last, lasts, 1, cutoff=0.75)]
    return close[0] if close else None


def _divisors(number: int) -> str:
    if number > 1 << 20:  # of a damaged file: not worth counting
        return f"a divisor of {number}"
    found = [str(n) for n in range(1, number + 1) if number % n == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"
