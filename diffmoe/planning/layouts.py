"""Ways to distribute a run over a machine."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from diffmoe.config import (
    ZERO_BUCKET,
    AlignConfig,
    Config,
    LoRAConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainingConfig,
)
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.models.frozen import freeze
from diffmoe.models.lora import is_factor
from diffmoe.models.routing import expert_capacity
from diffmoe.models.updates import updates
from diffmoe.parallel.gradient_types import gradient_types
from diffmoe.parallel.orthogonalize import Matrices
from diffmoe.parallel.topology import Topology

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Zero:
    """The settings of a DeepSpeed JSON that affect memory.

    bucket: elements of a reduce bucket. buckets: how many exist at once. offload: masters, moments,
    averages and their gradients are in host memory. pinned: that memory is page-locked.
    accumulated, reduced: bytes of an element of gradients over micro-batches, and between ranks.
    (allgather_bucket_size only splits a collective, it needs no memory.)
    """

    bucket: int = ZERO_BUCKET
    buckets: int = 1
    offload: bool = False
    pinned: bool = False
    accumulated: int = BYTES["fp32"]
    reduced: int = BYTES["fp32"]

    @classmethod
    def of(cls, ds_settings: Mapping[str, Any]) -> "Zero":
        """ds_settings: the JSON as diffmoe.parallel.zero.read_ds_config returns it."""
        zero = ds_settings.get("zero_optimization", {})
        offload = zero.get("offload_optimizer") or {}
        accumulated, reduced = gradient_types(ds_settings)
        return cls(
            bucket=int(zero.get("reduce_bucket_size", cls.bucket)),
            buckets=2 if zero.get("overlap_comm") else 1,
            offload=offload.get("device", "none") != "none",
            pinned=bool(offload.get("pin_memory")),
            accumulated=BYTES[accumulated],
            reduced=BYTES[reduced],
        )


class Flat(NamedTuple):
    """Trainable elements of one rank that are updated alike: a parameter group.

    experts: of the rank's experts. routing: fp32 in a bf16 run. matrices: those that Muon
    orthogonalizes, in the network's order, which make up the whole group; none: AdamW's.
    """

    elements: int
    experts: bool
    routing: bool
    matrices: tuple[Matrices, ...]


class Weight(NamedTuple):
    """A parameter. row: elements that a row of its input meets; of stacked experts, one's."""

    row: int
    trains: bool


@dataclass(frozen=True)
class Sizes:
    """Elements of one rank. The projector of an aligned run is dense.

    parameters: all of them, by name.
    frozen_dense, frozen_routing, frozen_experts: of those that do not train.
    lora_dense, lora_experts: how many weights have LoRA's factors, a stack of experts' is one.
    largest: of the largest parameter that does.
    """

    parameters: Mapping[str, Weight]
    groups: tuple[Flat, ...]
    largest: int
    frozen_dense: int
    frozen_routing: int
    frozen_experts: int
    lora_dense: int
    lora_experts: int

    @property
    def dense(self) -> int:
        """Trainable, but for experts."""
        return sum(group.elements for group in self.groups if not group.experts)

    @property
    def experts(self) -> int:
        """Trainable, of this rank's experts."""
        return sum(group.elements for group in self.groups if group.experts)

    @property
    def frozen(self) -> int:
        return self.frozen_dense + self.frozen_routing + self.frozen_experts


@lru_cache(maxsize=64)
def sizes_of(
    model_json: str,
    moe_json: str,
    align_json: str,
    lora_json: str,
    training_json: str,
    optimizer_json: str,
    expert_parallel: int,
) -> Sizes:
    topology = Topology(expert_parallel=expert_parallel)
    with torch.device("meta"):
        network = DiT(
            ModelConfig.model_validate_json(model_json),
            MoEConfig.model_validate_json(moe_json),
            topology,
            align=AlignConfig.model_validate_json(align_json),
            lora=LoRAConfig.model_validate_json(lora_json),
        )
    training = TrainingConfig.model_validate_json(training_json)
    freeze(network, training)
    of_experts, of_routing = network.expert_parameters(), network.routing_parameters()
    how = updates(network, OptimizerConfig.model_validate_json(optimizer_json))
    frozen: Counter[str] = Counter()
    groups: dict[Any, Flat] = {}
    largest = 0
    for name, parameter in network.named_parameters():
        elements, update = parameter.numel(), how[name]
        if not parameter.requires_grad:
            kind = "experts" if name in of_experts else "routing" if name in of_routing else "dense"
            frozen[kind] += elements
            continue
        experts, routing = name in of_experts, name in of_routing and training.precision == "bf16"
        key = (experts, routing, update.shared)
        group = groups.get(key, Flat(0, experts, routing, ()))
        stack = () if update.matrices is None else (update.matrices,)
        groups[key] = Flat(group.elements + elements, experts, routing, group.matrices + stack)
        largest = max(largest, elements)
    factors = [name for name, _ in network.named_parameters() if is_factor(name)]
    return Sizes(
        parameters={
            name: Weight(one.numel() // (len(one) if name in of_experts else 1), one.requires_grad)
            for name, one in network.named_parameters()
        },
        groups=tuple(groups.values()),
        largest=largest,
        frozen_dense=frozen["dense"],
        frozen_routing=frozen["routing"],
        frozen_experts=frozen["experts"],
        lora_dense=sum(name not in of_experts for name in factors) // 2,
        lora_experts=sum(name in of_experts for name in factors) // 2,
    )


@dataclass(frozen=True)
class Layout:
    """A configuration on a number of GPUs, one rank per GPU, and the sizes that follow from it."""

    config: Config
    nodes: int
    gpus_per_node: int
    zero: Zero = Zero()

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def expert_parallel(self) -> int:
        return self.config.parallel.expert_parallel

    @property
    def accumulation(self) -> int:
        return self.config.training.accumulation

    @property
    def micro_batch(self) -> int:
        """Samples per GPU and forward."""
        return self.config.training.batch_size // (self.world * self.accumulation)

    @property
    def frozen_share(self) -> int:
        """Elements of frozen parameters that one rank keeps in fp32 and saves, to rounding.

        In a bf16 run copies, but for those that route.
        """
        return self.sizes.frozen_routing // self.world + self.frozen_copies

    @property
    def frozen_copies(self) -> int:
        sizes = self.sizes
        return sizes.frozen_dense // self.world + sizes.frozen_experts // self.expert_replicas

    @property
    def element(self) -> int:
        """Bytes of one element of parameters and activations, but for those that route: fp32."""
        return BYTES[self.config.training.precision]

    @property
    def sizes(self) -> Sizes:
        config = self.config
        return sizes_of(
            *(
                part.model_dump_json()
                for part in (
                    config.model,
                    config.moe,
                    config.align,
                    config.lora,
                    config.training,
                    config.optimizer,
                )
            ),
            self.expert_parallel,
        )

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts (an expert-data-parallel group)."""
        return self.world // self.expert_parallel

    @property
    def tokens(self) -> int:
        """S: tokens per GPU and forward."""
        return self.micro_batch * self.tokens_per_sample

    @property
    def tokens_per_sample(self) -> int:
        return math.prod(self.config.model.grid)

    @property
    def features_per_sample(self) -> int:
        """Bytes of an aligned sample's features, on a grid like that of the tokens, in float16."""
        align = self.config.align
        return 0 if align.block is None else self.tokens_per_sample * align.width * BYTES["bf16"]

    @property
    def moe_layers(self) -> int:
        moe, depth = self.config.moe, self.config.model.depth
        if moe.type == "dense":
            return 0
        return depth if moe.every_block else depth // 2

    @property
    def rows(self) -> int:
        """N: token-expert pairs that one GPU sends to the experts of one layer.

        Exact in the default pool and for expert choice; with a wide pool, race or token choice it
        is the average over ranks.
        """
        moe = self.config.moe
        if moe.chosen_by_tokens:
            return self.tokens * moe.top_k - self.rows_apart * moe.top_k
        if moe.type == "expert_choice":
            return self.micro_batch * moe.experts * self._capacity(self.tokens_per_sample)
        ranks = {"micro_batch": 1, "expert_parallel": self.expert_parallel, "global": self.world}
        pool = ranks[moe.token_pool]
        if moe.type == "race":
            pairs = self.tokens * pool * moe.experts
            winners = expert_capacity(pairs, moe.experts, moe.capacity, moe.capacity_rounding)
            return winners // pool
        return moe.experts * self._capacity(self.tokens * pool) // pool

    @property
    def rows_apart(self) -> int:
        """Tokens of samples without a condition, on average, which an expert of their own takes."""
        promoe = self.config.moe.type == "promoe"
        return round(self.tokens * self.config.training.label_dropout) if promoe else 0

    def _capacity(self, tokens: int) -> int:
        moe = self.config.moe
        return expert_capacity(tokens, moe.experts, moe.capacity, moe.capacity_rounding)

    def changed(self, changes: dict[str, Any]) -> "Layout":
        """A copy with other settings. changes: by dotted key."""
        return replace(self, config=self.config.replace(changes))

    def describe(self) -> str:
        """In a few words, as a line of a table begins."""
        checkpointing = self.config.training.activation_checkpointing
        return (
            f"P={self.expert_parallel} stage {self.config.parallel.zero_stage} "
            f"micro-batch {self.micro_batch} x {self.accumulation}"
            + (" checkpointing" if checkpointing else "")
        )


def possible_layouts(
    config: Config,
    nodes: int,
    gpus_per_node: int,
    expert_parallel: int | None = None,
    zero_stage: int | None = None,
    micro_batch: int | None = None,
    zero: Zero = Zero(),
) -> Iterator[Layout]:
    """Every layout with the run's batch size, with and without activation checkpointing.

    expert_parallel, zero_stage, micro_batch: fix one of the choices. Raises UserError if the
    configuration does not fit this number of GPUs, or a fixed choice is not possible.
    """
    world, batch = nodes * gpus_per_node, config.training.batch_size
    if batch % world:
        raise UserError(
            f"training.batch_size={batch} is not divisible by {nodes} nodes x {gpus_per_node} GPUs "
            f"= {world} ranks; set it to a multiple of {world}"
        )
    if config.data.lanes % world:
        raise UserError(
            f"data.lanes={config.data.lanes} is not divisible by {nodes} nodes x {gpus_per_node} "
            f"GPUs = {world} ranks; set data.lanes to a multiple of {world}"
        )
    experts = 1 if config.moe.type == "dense" else config.moe.experts
    shares = [p for p in range(1, world + 1) if world % p == 0 and experts % p == 0]
    micros = [
        m
        for m in range(1, batch // world + 1)
        if batch % (world * m) == 0 and batch % (config.data.lanes * (batch // (world * m))) == 0
    ]
    for name, value, allowed in (
        ("expert_parallel", expert_parallel, shares),
        ("micro_batch", micro_batch, micros),
    ):
        if value is not None and value not in allowed:
            raise UserError(f"{name}={value} does not fit {world} ranks; choose one of {allowed}")
    for p in shares if expert_parallel is None else [expert_parallel]:
        for stage in (1, 2) if zero_stage is None else (zero_stage,):
            for micro in micros if micro_batch is None else [micro_batch]:
                for checkpointing in (False, True):
                    changes = {
                        "parallel.expert_parallel": p,
                        "parallel.zero_stage": stage,
                        "training.accumulation": batch // (world * micro),
                        "training.activation_checkpointing": checkpointing,
                    }
                    yield Layout(config, nodes, gpus_per_node, zero).changed(changes)
