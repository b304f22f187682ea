"""The backbone: patchify, embed, blocks, unpatchify."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from diffmoe.conditions import Condition, Text
from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.errors import UserError
from diffmoe.models.blocks import (
    Block,
    TimestepEmbedder,
    dense_mlp,
    grid_positions,
    modulate,
    rotary_angles,
)
from diffmoe.models.experts import Experts
from diffmoe.models.inputs import check_inputs
from diffmoe.models.moe import LayerRouting, MoEFeedForward
from diffmoe.models.routing_mode import RoutingMode, check_capacity
from diffmoe.models.text_embedding import TextEmbedder
from diffmoe.parallel.topology import Topology
from diffmoe.seeding import keyed_generator

# Zero at the start: the output, and all that captions add, so that a text model starts as one
# without text.
_AT_ZERO = ("final", "text_embed.pooled_embed.", "text_embed.null_pooled")
_PARTS_AT_ZERO = (".adaln.", ".cross_attention.proj.")
_EMBEDDINGS = (
    "timestep_embed",
    "label_embed",
    "text_embed.null_token",
)
# At the scale of what their blocks add: smaller ones are lost in it, and words lose their order.
_TEXT_EMBEDDINGS = ("text_embed.encoder.embed", "text_embed.encoder.places")


class DiTOutput(NamedTuple):
    """prediction (B, C or 2C, H, W) in fp32, and each MoE layer's routing, first layer first."""

    prediction: Tensor
    routing: list[LayerRouting]


# torch.export.save and load find the types by these names; torch has no public function for it.
for _kind in (Text, DiTOutput, LayerRouting):
    pytree._register_namedtuple(_kind, serialized_type_name=f"diffmoe.{_kind.__name__}")


class DiT(nn.Module):
    """A diffusion transformer; every second (or every) feed-forward is a mixture of experts."""

    def __init__(
        self, model: ModelConfig, moe: MoEConfig, topology: Topology | None = None
    ) -> None:
        """Parameters are uninitialized: call `initialize`, or load them."""
        super().__init__()
        topology = topology or Topology()
        self.config, self.moe_config, self.topology = model, moe, topology
        self.grid = model.input_size // model.patch_size
        self.out_channels = model.in_channels * (2 if model.learn_sigma else 1)
        self.patch_embed = nn.Conv2d(
            model.in_channels, model.width, model.patch_size, stride=model.patch_size
        )
        self.timestep_embed = TimestepEmbedder(model.width)
        self.label_embed = self.text_embed = None
        if model.text is None:
            # One row more than classes: the null label that guidance and label dropout use.
            self.label_embed = nn.Embedding(model.num_classes + 1, model.width)
        else:
            self.text_embed = TextEmbedder(model.text, model.width)
        self.blocks = nn.ModuleList(
            Block(
                model.width,
                model.heads,
                model.width_of_head,
                model.qk_norm,
                self._feed_forward(index),
                cross_attention=model.text is not None,
            )
            for index in range(model.depth)
        )
        self.final_norm = nn.LayerNorm(model.width, elementwise_affine=False, eps=1e-6)
        self.final_adaln = nn.Linear(model.width, 2 * model.width)
        self.final = nn.Linear(model.width, model.patch_size**2 * self.out_channels)
        self.register_buffer("positions", grid_positions(model.width, self.grid), persistent=False)
        rotation = rotary_angles(self.grid, model.width_of_head) if model.rope else None
        self.register_buffer("rotation", rotation, persistent=False)
        self._routing = RoutingMode(moe.inference) if self.has_thresholds else None

    def _feed_forward(self, block: int) -> nn.Module:
        is_moe = self.moe_config.type != "dense" and (self.moe_config.every_block or block % 2)
        if is_moe:
            return MoEFeedForward(self.config, self.moe_config, self.topology)
        model = self.config
        return dense_mlp(model.width, int(model.width * model.mlp_ratio), model.mlp_activation)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> DiTOutput:
        """x (B, C, H, W) noisy latents, t (B,).

        condition: labels (B,), num_classes being the null one; of a text model its captions.
        Raises ValueError for other shapes, some of which would be computed with in silence.
        """
        check_inputs(self.config, x, t, condition)
        x_BDT = self.patch_embed(x.to(self.patch_embed.weight.dtype)).flatten(2)
        # Sums keep the layout of their first term: all blocks would go on in that of the patches.
        x_BTD = x_BDT.transpose(1, 2).contiguous() + self.positions.to(x_BDT.dtype)
        if self.text_embed is None:
            context, vector = None, self.label_embed(condition)
        else:
            context, vector = self.text_embed(condition)
        time_BD = self.timestep_embed(t)
        condition_BD = time_BD + vector
        routing = []
        for block in self.blocks:
            x_BTD, decided = block(x_BTD, condition_BD, time_BD, self.rotation, context)
            if decided is not None:
                routing.append(decided)
        shift, scale = self.final_adaln(F.silu(condition_BD)).chunk(2, dim=-1)
        patches = self.final(modulate(self.final_norm(x_BTD), shift, scale))
        return DiTOutput(self._unpatchify(patches), routing)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, T, p*p*C) -> (B, C, H, W), in fp32 at least."""
        B, p, g = patches.shape[0], self.config.patch_size, self.grid
        image = patches.view(B, g, g, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        dtype = torch.promote_types(patches.dtype, torch.float32)
        return image.reshape(B, self.out_channels, g * p, g * p).to(dtype)

    @property
    def moe_layers(self) -> list[MoEFeedForward]:
        layers = (block.feed_forward for block in self.blocks)
        return [layer for layer in layers if isinstance(layer, MoEFeedForward)]

    @property
    def thresholds_LE(self) -> Tensor:
        """The capacity thresholds of all MoE layers, a copy."""
        return torch.stack([layer.capacity_predictor.thresholds for layer in self.moe_layers])

    @property
    def has_thresholds(self) -> bool:
        """Whether a predictor decides at inference, so that capacity can be chosen."""
        return self.moe_config.type == "diffmoe" and bool(self.moe_layers)

    @property
    def shares_compute(self) -> bool:
        """Whether a sample's routing depends on its batch mates, in evaluation."""
        return self.routing is not None and self.routing.kind != "per_token"

    @property
    def routing(self) -> RoutingMode | None:
        """How evaluation routes; None where there is one way alone (no capacity predictor).

        Setting it raises UserError for a mode that the network cannot follow.
        """
        return self._routing

    @routing.setter
    def routing(self, mode: RoutingMode) -> None:
        moe = self.moe_config
        if not self.has_thresholds:
            family = moe.type if self.moe_layers else "dense"
            raise UserError(
                f"routing {mode.kind}: a {family} model routes in one way alone; leave it out"
            )
        if mode.capacity is not None:
            check_capacity(mode.capacity, moe.experts)
        self._routing = mode
        for number, layer in enumerate(self.moe_layers):
            layer.inference = mode.kind
            layer.capacity = moe.capacity if mode.capacity is None else mode.capacity
            predictor, log_odds_LE = layer.capacity_predictor, mode.log_odds_LE
            predictor.log_odds = (
                None if log_odds_LE is None else log_odds_LE[number].to(predictor.thresholds.device)
            )

    @contextmanager
    def routed(self, mode: RoutingMode) -> Iterator[None]:
        """Route by a mode for a while, then as before."""
        before = self.routing
        self.routing = mode
        try:
            yield
        finally:
            self.routing = before

    def route_by(self, kind: str, capacity: float | None = None) -> None:
        """Set `routing` but for its thresholds, which stay."""
        log_odds_LE = None if self.routing is None else self.routing.log_odds_LE
        self.routing = RoutingMode(kind, capacity, log_odds_LE)

    def move_thresholds(self, kth_LE: Tensor) -> None:
        """One step of their moving average (Eq. 17) towards the K-th largest probabilities."""
        for layer, kth_E in zip(self.moe_layers, kth_LE, strict=True):
            layer.capacity_predictor.thresholds.lerp_(kth_E, 1 - self.moe_config.threshold_ema)

    def checkpoint_activations(self, active: bool) -> None:
        """Compute each block's activations again in the backward pass instead of keeping them."""
        for module in self.modules():
            if isinstance(module, Block | MoEFeedForward):
                module.checkpointing = active

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of which this rank holds a part: rows of dimension 0 are experts."""
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in self.named_modules()
            if isinstance(module, Experts)
            for name, parameter in module.named_parameters()
        }

    @torch.no_grad()
    def initialize(self, seed: int) -> "DiT":
        """DiT's initialization; the router's as in the paper's release.

        Each tensor, and each expert under its global number, has a generator of its own, so the
        weights do not depend on how many ranks share the experts.
        """
        experts = self.expert_parameters()
        for name, parameter in self.named_parameters():
            if name not in experts:
                self._initialize_one(name, parameter, keyed_generator(seed, "init", name))
                continue
            first = self.topology.expert_rank * len(parameter)
            for offset, one in enumerate(parameter):
                # Expert matrices are stored (in, out): Xavier's bound is the same.
                self._initialize_one(name, one, keyed_generator(seed, "init", name, first + offset))
        return self

    @torch.no_grad()
    def initial(self, name: str, seed: int) -> Tensor:
        """One parameter that is no expert's, as `initialize` makes it; works on the meta device."""
        tensor = torch.empty(self.get_parameter(name).shape)
        self._initialize_one(name, tensor, keyed_generator(seed, "init", name))
        return tensor

    def _initialize_one(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        leaf = name.rsplit(".", 1)[-1]
        if "_norm." in name:
            tensor.fill_(1.0)
        elif (
            leaf in ("bias", "b_in", "b_out")
            or name.startswith(_AT_ZERO)
            or any(part in name for part in _PARTS_AT_ZERO)
        ):
            tensor.zero_()
        elif leaf in ("router", "router_time"):
            _fill_normal(tensor, self.moe_config.router_init_std, generator)
        elif ".experts." in name and self.moe_config.expert_init_std is not None:
            _fill_normal(tensor, self.moe_config.expert_init_std, generator)
        elif name.startswith(_EMBEDDINGS):
            _fill_normal(tensor, 0.02, generator)
        elif name.startswith(_TEXT_EMBEDDINGS):
            _fill_normal(tensor, 1.0, generator)
        else:
            rows, columns = tensor.flatten(1).shape
            bound = (6 / (rows + columns)) ** 0.5
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
            tensor.copy_((2 * drawn - 1) * bound)

    def parameter_count(self) -> int:
        """Trainable parameters of the whole model, all ranks' experts included."""
        experts = self.expert_parameters()
        return sum(
            parameter.numel() * (self.topology.expert_parallel if name in experts else 1)
            for name, parameter in self.named_parameters()
        )


def _fill_normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float32) * std)
