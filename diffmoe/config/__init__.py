"""One typed, validated configuration of a run; unknown keys are errors."""

import math
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from diffmoe.config.model import (
    BYTES,
    AlignConfig,
    LoRAConfig,
    ModelConfig,
    Size,
    TextConfig,
    WideHeadConfig,
    show_size,
    sides,
)
from diffmoe.config.moe import MoEConfig
from diffmoe.config.optimizer import MuonConfig, OptimizerConfig, RateMultipliers
from diffmoe.config.section import Section, divisors
from diffmoe.config.settings import explained_lines, explained_problem, set_value
from diffmoe.config.training import (
    ZERO_BUCKET,
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    LoggingConfig,
    ParallelConfig,
    TrainingConfig,
    ValidationConfig,
)
from diffmoe.errors import UserError

__all__ = [
    "BYTES",
    "ZERO_BUCKET",
    "AlignConfig",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "EvaluationConfig",
    "LoRAConfig",
    "LoggingConfig",
    "MoEConfig",
    "ModelConfig",
    "MuonConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RateMultipliers",
    "Size",
    "TextConfig",
    "TrainingConfig",
    "ValidationConfig",
    "WideHeadConfig",
    "set_value",
    "show_size",
    "sides",
    "validated",
]


class Config(Section):
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
                f"choose {divisors(experts)}"
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
                f"choose {divisors(world)}, or start a multiple of {ranks} ranks"
            )
        # The batch divides by the lanes, so what the lanes allow the batch allows too.
        if lanes % world:
            raise UserError(
                f"data.lanes={lanes} is not divisible by {world} ranks; start "
                f"{divisors(lanes)} ranks, or set data.lanes to a multiple of {world}"
            )

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def explained(self) -> str:
        """The same settings as YAML, what each one means in a comment behind it."""
        return "".join(explained_lines(self, self.model_dump(mode="json"), ""))

    def explained_section(self, name: str) -> str:
        """`explained` of one section. Raises UserError for a name that is none."""
        sections = [one for one, value in self if isinstance(value, Section)]
        if name not in sections:
            raise UserError(f"no section {name!r}; there are {', '.join(sections)}")
        section, values = getattr(self, name), self.model_dump(mode="json")[name]
        head = f"# {(section.__doc__ or '').splitlines()[0]}\n{name}:\n"
        return head + "".join(explained_lines(section, values, "  "))

    def replace(self, changes: dict[str, Any]) -> "Config":
        """A validated copy with dotted keys changed, e.g. {"training.precision": "bf16"}."""
        values = self.model_dump(exclude_unset=True)
        if self.data.allow_commands:  # which no dump holds
            set_value(values, "data.allow_commands", True)
        for key, value in changes.items():
            set_value(values, key, value)
        return validated(values, "the configuration")


def validated(values: dict[str, Any], source: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(
            "\n".join(f"{source}: {explained_problem(one, Config)}" for one in error.errors())
        ) from None
