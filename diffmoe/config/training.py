"""What a run does: objective, data, loop, what it measures, and its ranks."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from diffmoe.config.section import Section


class DiffusionConfig(Section):
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


class DataConfig(Section):
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


# Of an average over the run so far; a plain mean of all steps has 12^-0.5.
RelativeLength = Annotated[float, Field(ge=0.005, lt=12**-0.5)]


class TrainingConfig(Section):
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


class ValidationConfig(Section):
    """The held-out loss of training.validate_every: fixed samples, noise and times."""

    path: str | None = Field(None, description="folder of shards that are never trained on")
    samples: int = Field(2048, ge=1, description="of that folder, of which as many must be there")


class EvaluationConfig(Section):
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


class ParallelConfig(Section):
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


class LoggingConfig(Section):
    """Metrics go to metrics.jsonl always, and to wandb (offline without a key)."""

    log_samples: int = Field(256 * 50, ge=1, description="between two lines of metrics.jsonl")
    wandb: bool = Field(True, description="log there, too")
    project: str = Field("diffmoe", description="of wandb")
