"""The network: patchify, embed, blocks, a wide head or none, unpatchify."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from diffmoe.conditions import Condition, Text, is_unconditional
from diffmoe.config import AlignConfig, LoRAConfig, ModelConfig, MoEConfig
from diffmoe.errors import UserError
from diffmoe.models.alignment import Projector, is_of_projector
from diffmoe.models.blocks import (
    Block,
    TimestepEmbedder,
    dense_mlp,
    grid_positions,
    modulate,
    patch_tokens,
    rotary_angles,
)
from diffmoe.models.experts import Experts
from diffmoe.models.families import create_moe
from diffmoe.models.initialization import initializers_of, normal, starting, zero_linear
from diffmoe.models.inputs import check_inputs
from diffmoe.models.lora import add_factors
from diffmoe.models.moe import LayerRouting, MoEFeedForward
from diffmoe.models.precision import autocast_to
from diffmoe.models.routing_mode import Kind, RoutingMode, check_capacity
from diffmoe.models.text_embedding import TextEmbedder
from diffmoe.models.thresholded import ThresholdedMoE
from diffmoe.models.wide_head import WideHead
from diffmoe.parallel.topology import Topology
from diffmoe.seeding import keyed_generator


class DiTOutput(NamedTuple):
    """prediction (B, C or 2C, H, W) in fp32 at least, and each MoE layer's routing, in order.

    projected: (B, T, Z), the aligned block's tokens as the features of an encoder, if asked for.
    """

    prediction: Tensor
    routing: list[LayerRouting]
    projected: Tensor | None = None


# torch.export.save and load find the types by these names; torch has no public function for it.
for _kind in (Text, DiTOutput, LayerRouting):
    pytree._register_namedtuple(_kind, serialized_type_name=f"diffmoe.{_kind.__name__}")


class DiT(nn.Module):
    """A diffusion transformer; every second (or every) feed-forward is a mixture of experts.

    Those of a wide head (WideHead) are dense.

    topology: of the ranks that share the experts; None: this process has all of them.
    autocast: the type that a forward's products are computed in, by torch.autocast; routing and
    sums stay in fp32. None: the parameters' own, or what a surrounding autocast says.
    """

    autocast: torch.dtype | None = None
    positions: Tensor
    rotation: Tensor | None

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        topology: Topology | None = None,
        seed: int | None = 0,
        align: AlignConfig | None = None,
        lora: LoRAConfig | None = None,
    ) -> None:
        """seed: of the initial values, see `initialize`. None leaves the parameters uninitialized,
        for a network that is filled next; on the meta device there is nothing to initialize.

        align: for training alone; its block's tokens get a projector. lora: likewise; weights get
        factors. Raises UserError for a target that the network does not have.
        """
        super().__init__()
        topology = topology or Topology()
        self.config, self.moe_config, self.topology = model, moe, topology
        self.out_channels = model.in_channels * (2 if model.learn_sigma else 1)
        self.patch_embed = nn.Conv2d(
            model.in_channels, model.width, model.patch_size, stride=model.patch_size
        )
        self.timestep_embed = TimestepEmbedder(model.width)
        self.label_embed: nn.Embedding | None = None
        self.text_embed: TextEmbedder | None = None
        if model.text is None:
            # One row more than classes: the null label that guidance and label dropout use.
            self.label_embed = starting(
                nn.Embedding(model.num_classes + 1, model.width), weight=normal(0.02)
            )
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
        self.projector: Projector | None = None
        self.aligned_block = None if align is None else align.block
        if align is not None and align.block is not None:
            self.projector = Projector(align, model.width, model.grid)
        self.wide_head: WideHead | None = None
        last = model.width
        if model.wide_head is not None:
            self.wide_head, last = WideHead(model, model.wide_head), model.wide_head.width
        self.final_norm = nn.LayerNorm(last, elementwise_affine=False, eps=1e-6)
        self.final_adaln = zero_linear(last, 2 * last)
        self.final = zero_linear(last, model.patch_size**2 * self.out_channels)
        if lora is not None and lora.rank:
            add_factors(self, lora)
        self.register_buffer("positions", grid_positions(model.width, model.grid), persistent=False)
        rotation = None
        if model.rope:
            rotation = rotary_angles(model.grid, model.width_of_head, model.rope_grid)
        self.register_buffer("rotation", rotation, persistent=False)
        self._routing = RoutingMode(moe.inference) if self.has_thresholds else None
        if seed is not None and not self.positions.is_meta:
            self.initialize(seed)

    def _feed_forward(self, block: int) -> nn.Module:
        is_moe = self.moe_config.type != "dense" and (self.moe_config.every_block or block % 2)
        if is_moe:
            return create_moe(self.config, self.moe_config, self.topology)
        model = self.config
        return dense_mlp(model.width, int(model.width * model.mlp_ratio), model.mlp_activation)

    def forward(
        self, x: Tensor, t: Tensor, condition: Condition, project: bool = False
    ) -> DiTOutput:
        """The prediction for noisy latents x (B, C, H, W) at times t (B,).

        condition: labels (B,), where num_classes is the null label; or captions, of a text model.
        project: also return the projected tokens, of a network with a projector.
        Raises ValueError for inputs of other shapes or types.
        """
        check_inputs(self.config, x, t, condition)
        with autocast_to(self.autocast, x):
            return self._forward(x, t, condition, project)

    def _forward(self, x: Tensor, t: Tensor, condition: Condition, project: bool) -> DiTOutput:
        x_BTD = patch_tokens(self.patch_embed, x)
        x_BTD = x_BTD + self.positions.to(x_BTD.dtype)
        context = None
        if self.text_embed is not None:
            context, vector = self.text_embed(condition)
        else:
            assert self.label_embed is not None
            vector = self.label_embed(condition)
        time_BD = self.timestep_embed(t)
        condition_BD = time_BD + vector
        null_B = is_unconditional(condition, self.config.num_classes)
        routing, projected = [], None
        for number, block in enumerate(self.blocks, 1):
            x_BTD, layer_routing = block(
                x_BTD, condition_BD, time_BD, null_B, self.rotation, context
            )
            if project and number == self.aligned_block:
                assert self.projector is not None
                projected = self.projector(x_BTD)
            if layer_routing is None:
                continue
            if layer_routing.target_prediction is not None:
                target = self._unpatchify(layer_routing.target_prediction)
                layer_routing = layer_routing._replace(target_prediction=target)
            routing.append(layer_routing)
        last_condition = condition_BD
        if self.wide_head is not None:
            x_BTD, last_condition = self.wide_head(x, x_BTD, time_BD, null_B)
        shift, scale = self.final_adaln(F.silu(last_condition)).chunk(2, dim=-1)
        patches = self.final(modulate(self.final_norm(x_BTD), shift, scale))
        return DiTOutput(self._unpatchify(patches), routing, projected)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, T, p*p*C) -> (B, C, H, W), in fp32 at least."""
        B, p, (rows, columns) = patches.shape[0], self.config.patch_size, self.config.grid
        channels = patches.shape[2] // p**2
        image = patches.view(B, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        dtype = torch.promote_types(patches.dtype, torch.float32)
        return image.reshape(B, channels, rows * p, columns * p).to(dtype)

    @property
    def all_blocks(self) -> list[nn.Module]:
        """Of the backbone, then of the wide head."""
        return [*self.blocks, *(self.wide_head.blocks if self.wide_head is not None else ())]

    @property
    def feed_forwards(self) -> list[nn.Module]:
        """Of the backbone's blocks, dense and MoE."""
        return [block.get_submodule("feed_forward") for block in self.blocks]

    @property
    def moe_layers(self) -> list[MoEFeedForward]:
        return [layer for layer in self.feed_forwards if isinstance(layer, MoEFeedForward)]

    @property
    def thresholded_layers(self) -> list[ThresholdedMoE]:
        """The MoE layers that route by thresholds at inference: all of them, or none."""
        return [layer for layer in self.moe_layers if isinstance(layer, ThresholdedMoE)]

    @property
    def thresholds_LE(self) -> Tensor:
        """A copy of the thresholds that training tracked, (L, E), or (L, 1) of expert race."""
        return torch.stack([layer.tracked for layer in self.thresholded_layers])

    @property
    def has_thresholds(self) -> bool:
        """Whether thresholds route at inference, so that capacity can be chosen."""
        return bool(self.thresholded_layers)

    @property
    def has_predictors(self) -> bool:
        """Whether capacity predictors say what the thresholds are compared with."""
        return any(layer.capacity_predictor is not None for layer in self.moe_layers)

    @property
    def shares_compute(self) -> bool:
        """Whether a sample's routing in evaluation depends on the rest of its batch."""
        return self.routing is not None and self.routing.kind != "per_token"

    @property
    def routing(self) -> RoutingMode | None:
        """How evaluation routes; None without thresholds, where there is only one way.

        Setting it raises UserError for a mode that the network does not have.
        """
        return self._routing

    @routing.setter
    def routing(self, mode: RoutingMode) -> None:
        moe = self.moe_config
        if not self.has_thresholds:
            family = moe.type if self.moe_layers else "dense"
            raise UserError(
                f"routing {mode.kind}: a {family} model has only one way to route; leave it out"
            )
        if mode.capacity is not None:
            check_capacity(mode.capacity, moe.experts)
        self._routing = mode
        calibrated_LE = mode.calibrated_LE
        for number, layer in enumerate(self.thresholded_layers):
            layer.inference = mode.kind
            layer.capacity = moe.capacity if mode.capacity is None else mode.capacity
            layer.calibrated_E = (
                None if calibrated_LE is None else calibrated_LE[number].to(layer.tracked.device)
            )

    @contextmanager
    def routed(self, mode: RoutingMode) -> Iterator[None]:
        """Route by `mode` inside of the `with` block, afterwards as before."""
        before = self.routing
        self.routing = mode
        try:
            yield
        finally:
            if before is not None:
                self.routing = before

    def route_by(self, kind: Kind, capacity: float | None = None) -> None:
        """Set kind and capacity of `routing`; its thresholds stay."""
        calibrated_LE = None if self.routing is None else self.routing.calibrated_LE
        self.routing = RoutingMode(kind, capacity, calibrated_LE)

    def move_routing_state(self, seen_LX: Tensor) -> None:
        """One step of all layers' thresholds or biases. seen_LX: of `MoEFeedForward.observed`."""
        for layer, seen_X in zip(self.moe_layers, seen_LX, strict=True):
            layer.move(seen_X)

    def checkpoint_activations(self, active: bool) -> None:
        """Compute each block's activations again in the backward pass instead of keeping them."""
        for module in self.modules():
            if isinstance(module, Block | MoEFeedForward):
                module.checkpointing = active

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of which this rank holds a part: dimension 0 counts its experts."""
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in self.named_modules()
            if isinstance(module, Experts)
            for name, parameter in module.named_parameters()
        }

    def routing_parameters(self) -> dict[str, nn.Parameter]:
        """Those that decide which expert takes which token."""
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in self.named_modules()
            if isinstance(module, MoEFeedForward)
            for name, parameter in module.named_parameters()
            if name.split(".")[0] in module.routing_parts
        }

    def to_bf16(self) -> "DiT":
        """Cast the parameters to the types of a bf16 run: what routes is fp32, as buffers are."""
        self._cast(self.parameters(), torch.bfloat16)
        return self

    def compute_in(self, dtype: torch.dtype) -> None:
        """Set `autocast`, and keep the weights of the blocks' products in that type.

        It changes no number beside `autocast` alone, which would cast them in every forward. For
        evaluation: a trained network is left with rounded weights.
        """
        self.autocast = dtype
        parts = (part for block in self.all_blocks for part in block.modules())
        products = [part for part in parts if isinstance(part, nn.Linear | Experts)]
        self._cast((parameter for m in products for parameter in m.parameters()), dtype)

    def _cast(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        """All but those that decide the routing."""
        routing = {id(parameter) for parameter in self.routing_parameters().values()}
        for parameter in parameters:
            if id(parameter) not in routing:
                parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def initialize(self, seed: int) -> "DiT":
        """DiT's initialization; the router's as in the paper's release.

        Each tensor, and each expert under its global number, has a generator of its own, so the
        weights do not depend on how many ranks share the experts.
        """
        initializers, experts = initializers_of(self), self.expert_parameters()
        for name, parameter in self.named_parameters():
            initializer = initializers[name]
            if name not in experts:
                generator = keyed_generator(seed, "init", name)
                parameter.copy_(initializer(parameter.shape, generator))
                continue
            first = self.topology.expert_rank * len(parameter)
            for number, one in enumerate(parameter, first):
                generator = keyed_generator(seed, "init", name, number)
                one.copy_(initializer(one.shape, generator))
        return self

    def initial_value(self, name: str, seed: int) -> Tensor:
        """One parameter as `initialize` makes it, in fp32 on the CPU.

        The network may be on the meta device. Not for experts' parameters.
        """
        shape, generator = self.get_parameter(name).shape, keyed_generator(seed, "init", name)
        return initializers_of(self)[name](shape, generator)

    def parameter_count(self, names: Collection[str] | None = None) -> int:
        """Elements of parameters of the whole model, all ranks' experts included, no projector.

        names: of those to count; None: all.
        """
        experts = self.expert_parameters()
        return sum(
            parameter.numel() * (self.topology.expert_parallel if name in experts else 1)
            for name, parameter in self.named_parameters()
            if not is_of_projector(name) and (names is None or name in names)
        )
