"""What the network is made of, beside its experts."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from diffmoe.config.section import Section, divisors

# The encoder that a text model trains itself; any other's features come with the shards.
BYTES = "bytes"


class TextConfig(Section):
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


class WideHeadConfig(Section):
    """The wide head of RAE (DiT^DH, arXiv 2510.11690): dense blocks behind the backbone's."""

    width: int = Field(2048, ge=2, description="channels of its tokens, at least model.width")
    depth: int = Field(2, ge=1, description="blocks")
    heads: int = Field(16, ge=1, description="of attention, per block")

    @property
    def width_of_head(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads


# Of a square, or (height, width).
Size = int | tuple[int, int]


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def show_size(size: Size) -> str:
    """As it is written in a setting: 32, or [32, 48]."""
    return str(size if isinstance(size, int) else list(size))


_Positive = Annotated[int, Field(ge=1)]

# Of one sample. What no attention reaches; a damaged file must not make us lay them out.
_MOST_TOKENS = 1 << 18


class ModelConfig(Section):
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
    rope_grid: tuple[_Positive, _Positive] | None = Field(
        None,
        description="rows and columns of tokens that rotary angles are made for; another grid is "
        "spread over these; none: those of training.init's model, else its own",
    )
    text: TextConfig | None = Field(None, description="captions in the place of class labels")
    wide_head: WideHeadConfig | None = Field(
        None, description="a wider head for latents of many channels, docs/training.md; none: off"
    )

    @property
    def blocks(self) -> int:
        """Of the network with its wide head, and of the encoder of bytes."""
        more = (self.wide_head, self.text)
        return self.depth + sum(part.depth for part in more if part is not None)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network takes."""
        return (self.in_channels, *sides(self.input_size))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        _, height, width = self.latent_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def rotary_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens that rotary angles are made for."""
        return self.rope_grid or self.grid

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
                f"model.patch_size={self.patch_size}; choose {divisors(math.gcd(height, width))}"
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
                f"choose {divisors(self.width)}"
            )
        if self.rope and self.width_of_head % 4:
            head = f"model.head_width={self.head_width}"
            if self.head_width is None:
                head = f"model.width={self.width} / model.heads={self.heads}"
            raise ValueError(
                f"model.rope needs a head width divisible by 4, and {head} is {self.width_of_head}"
            )
        if self.rope_grid is not None and not self.rope:
            raise ValueError(
                f"model.rope_grid={list(self.rope_grid)} belongs to model.rope=true, rotary "
                "positions; set that, or leave model.rope_grid out"
            )
        if self.width % 4:
            raise ValueError(f"model.width={self.width} must be divisible by 4 (2-D positions)")
        if self.wide_head is not None:
            self._check_wide_head(self.wide_head)
        return self

    def _check_wide_head(self, head: WideHeadConfig) -> None:
        if head.width < self.width:
            raise ValueError(
                f"model.wide_head.width={head.width} is less than model.width={self.width}; choose "
                "a wider one, or no model.wide_head"
            )
        if head.width % head.heads:
            raise ValueError(
                f"model.wide_head.width={head.width} is not divisible by model.wide_head.heads="
                f"{head.heads}; choose {divisors(head.width)}"
            )
        if self.rope and head.width_of_head % 4:
            raise ValueError(
                "model.rope needs a head width divisible by 4, and model.wide_head.width="
                f"{head.width} / model.wide_head.heads={head.heads} is {head.width_of_head}"
            )

    @property
    def width_of_head(self) -> int:
        """Channels of one attention head."""
        return self.head_width or self.width // self.heads


class AlignConfig(Section):
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


class LoRAConfig(Section):
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
