"""The planner's figures against what the real model and engine do."""

import itertools
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from diffmoe.benchmarks.memory import Saved
from diffmoe.config import Config
from diffmoe.data.examples import micro_batches
from diffmoe.diffusion import create_objective
from diffmoe.models.alignment import alignment_loss, alignment_targets
from diffmoe.models.dit import DiT
from diffmoe.models.frozen import freeze
from diffmoe.models.moe import routing_loss
from diffmoe.planning.activations import kept_bytes
from diffmoe.planning.flops import forward_flops, step_flops
from diffmoe.planning.host import PINNED, host_memory
from diffmoe.planning.layouts import Layout, Zero
from diffmoe.planning.memory import memory, padded, partition_size
from diffmoe.planning.traffic import traffic
from tests.helpers.measured import saved_bytes, step_in_pretence, step_on_rank
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import BYTES, random_batch, randomize, tiny_config

# Sizes of which partitions' ends cut matrices.
MUON = {
    "optimizer__type": "muon",
    "model__width": 20,
    "model__depth": 2,
    "model__mlp_ratio": 3.0,
    "moe__activation": "swiglu",
    "moe__shared_expert_ratio": 1.0,
}
BY_ROLE = {
    "optimizer__weight_decay": 0.1,
    "optimizer__rate_multipliers": {"experts": 2.0, "router": 0.1, "attention": 0.5},
}
# Ranks, P, stage, precision, micro-batches, more.
LAYOUTS = [
    (1, 1, 1, "fp32", 1, {"training__ema_stds": (0.05, 0.1)}),
    (2, 1, 2, "fp32", 2, {}),
    (2, 2, 1, "bf16", 2, {"training__activation_checkpointing": True}),
    (2, 2, 1, "fp32", 1, {"moe__token_pool": "global", "training__ema_decay": None}),
    (4, 2, 1, "fp32", 1, {"moe__activation": "swiglu", "model__num_classes": 6}),
    (4, 4, 2, "bf16", 1, {"moe__every_block": True}),
    (4, 1, 1, "fp32", 1, {"moe__type": "dense"}),
    (2, 2, 1, "fp32", 1, {"model__text": BYTES}),
    (2, 2, 2, "bf16", 1, {"training__freeze": ("blocks.*", "label_embed.*")}),
    (4, 2, 1, "bf16", 1, {"training__train_only": ("*.experts.w_in", "*.attention.*")}),
    (4, 2, 1, "bf16", 1, {"lora": {"rank": 3, "targets": ("attention", "mlp", "experts")}}),
    (2, 1, 1, "fp32", 1, {**MUON, "moe__experts": 3, "training__freeze": ("*.qkv.*",)}),
    (2, 1, 2, "bf16", 2, {**MUON, "moe__experts": 3}),
    (4, 2, 1, "fp32", 1, {**MUON, "moe__experts": 2}),
    (2, 2, 1, "bf16", 1, BY_ROLE),
    (2, 1, 2, "fp32", 1, {**MUON, "moe__experts": 3, **BY_ROLE}),
    (2, 2, 1, "fp32", 1, {"moe__type": "race", "moe__token_pool": "global"}),
    (2, 2, 1, "bf16", 2, {"model__wide_head": {"width": 20, "heads": 2}}),
    (2, 2, 1, "fp32", 1, {"align": {"block": 2, "width": 6, "hidden": 10}}),
    (2, 2, 2, "fp32", 2, {"moe__type": "race", "moe__capacity": 2.0, "moe__target_loss_weight": 1}),
    (2, 2, 1, "fp32", 1, {"moe__type": "promoe", "training__label_dropout": 0.0}),
    (2, 2, 1, "fp32", 1, {"moe__type": "dsmoe", "moe__top_k": 2, "moe__shared_expert_ratio": 1.0}),
]


def predicted_bytes(layout: Layout) -> dict[str, int]:
    found: Counter[str] = Counter()
    for collective in traffic(layout):
        found[collective.operation] += collective.bytes
    return dict(found)


# A DeepSpeed JSON that saves bytes.
IN_BF16 = {"data_types": {"grad_accum_dtype": "bf16"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "ranks", "stage", "precision", "steps", "more", "settings"),
    [(*layout, {}) for layout in LAYOUTS]
    + [
        (2, 2, 1, "bf16", 2, {}, IN_BF16),
        (2, 1, 2, "bf16", 2, {}, IN_BF16),
        (2, 1, 1, "bf16", 2, {}, {"communication_data_type": "bf16"}),
    ],
)
def test_memory_and_traffic_equal_a_real_step(
    world: int,
    ranks: int,
    stage: int,
    precision: str,
    steps: int,
    more: dict,
    settings: dict,
):
    config = tiny_config(
        parallel__expert_parallel=ranks,
        parallel__zero_stage=stage,
        training__precision=precision,
        training__accumulation=steps,
        **more,
    )
    layout = Layout(config, 1, world, Zero.of(settings))
    planned = memory(layout)
    if config.optimizer.type == "muon":
        names = {collective.name for collective in traffic(layout)}
        assert {"dense matrices in parts", "expert matrices in parts"} <= names
    ranks_told = run_ranks(world, step_on_rank, config, settings)
    for told in ranks_told:
        for kind in ("parameters", "masters", "moments", "ema"):
            assert told[kind] == getattr(planned, kind), kind
        assert told["gradient_partition"] == 4 * partition_size(layout)
        # What is summed in fp32 is what the optimizer gets; else it gets a copy.
        copied = 0 if layout.zero.accumulated == 4 else told["gradient_partition"]
        assert planned.gradients == told["gradients_kept"] + told["gradients_summed"] + copied
        assert told["buckets"] == planned.buckets
    # Copies for saving: to padding, and what the planner adds for pinned memory.
    saved = sum(told["saves"] - told["buffers"] for told in ranks_told)
    assert host_memory(layout).saves / PINNED == pytest.approx(saved, rel=0.01)
    # A wide pool shares its rows out unevenly between ranks; the sum is as planned.
    sent: Counter[str] = Counter()
    for told in ranks_told:
        sent.update(told["sent"])
    assert sent == {name: world * size for name, size in predicted_bytes(layout).items()}


FREEZE = ("blocks.1.*", "blocks.2.attention.*")
OFFLOADED = [(*case, ()) for case in itertools.product((1, 2), (1, 2), ("fp32", "bf16"))]


@pytest.mark.parametrize(
    ("stage", "steps", "accumulated", "freeze"),
    [*OFFLOADED, (1, 2, "fp32", FREEZE), (2, 1, "bf16", FREEZE)],
)
def test_offloaded_states_equal_a_real_step(
    stage: int, steps: int, accumulated: str, freeze: tuple[str, ...]
):
    """They leave the GPU's memory for the host's, whatever device the test has.

    Not what is frozen, of which a bf16 network has fp32 copies.
    """
    config = tiny_config(
        parallel__expert_parallel=2,
        parallel__zero_stage=stage,
        training__precision="bf16",
        training__accumulation=steps,
        training__freeze=freeze,
    )
    settings = {
        "data_types": {"grad_accum_dtype": accumulated},
        "zero_optimization": {
            "reduce_bucket_size": 5000,
            "overlap_comm": stage == 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
        },
    }
    layout = Layout(config, 1, 2, Zero.of(settings))
    planned, host = memory(layout), host_memory(layout)
    stay = 4 * layout.frozen_copies
    assert (planned.masters, planned.moments, planned.ema) == (stay, 0, 0)
    assert (stay > 0) == bool(freeze)
    states = -2 * stay
    for told in run_ranks(2, step_on_rank, config, settings):
        returning, leaving, arriving = told["passing"]
        held = told["gradients_kept"] + told["gradients_summed"]
        assert planned.gradients == arriving + held
        assert planned.buckets == told["buckets"]
        kinds = ("masters", "gradient_partition", "moments", "ema", "accumulated")
        states += sum(told[kind] for kind in kinds) + returning + leaving
    # The planner does not know which parameter the two ranks share; in stage 2 both accumulate it
    # whole.
    twice = stage == 2 and steps > 1 and accumulated == "bf16"
    assert host.states == states - (2 * shared_by_two_ranks(config) if twice else 0)
    # Not pinned once more, but for the copies of what stays: with its average, as it is itself.
    pinned = 2 * 2 * 4 * layout.frozen_share * PINNED
    assert host.saves == pytest.approx(2 * 4 * 4 * partition_size(layout) + pinned)


@pytest.mark.parametrize(("world", "ranks"), [(64, 8), (256, 16)])
def test_traffic_of_a_large_world(world: int, ranks: int):
    config = tiny_config(
        parallel__expert_parallel=ranks,
        moe__experts=16,
        data__lanes=world,
        training__batch_size=2 * world,
    )
    (told,) = run_ranks(1, step_in_pretence, config, world, connect=False)
    layout = Layout(config, world // 8, 8)
    assert told["sent"] == predicted_bytes(layout)
    assert told["masters"] == memory(layout).masters


def shared_by_two_ranks(config: Config) -> int:
    """Elements of the dense bf16 parameter that ends on the second rank's partition; 0: none."""
    network = DiT(config.model, config.moe).to_bf16()
    apart = {id(p) for p in network.expert_parameters().values()}
    sizes = [
        p.numel()
        for p in network.parameters()
        if p.requires_grad and p.dtype == torch.bfloat16 and id(p) not in apart
    ]
    ends = list(itertools.accumulate(sizes))
    boundary = padded(ends[-1], 2) // 2
    return next(
        (size for size, end in zip(sizes, ends, strict=True) if end - size < boundary < end), 0
    )


def latents(**changes) -> Config:
    """Shapes of the ImageNet recipes, narrow."""
    shape = {
        "model__input_size": 32,
        "model__in_channels": 4,
        "model__width": 128,
        "model__heads": 4,
        "model__learn_sigma": True,
        "moe__experts": 8,
        "training__batch_size": 4,
    }
    return tiny_config(**{**shape, **changes})


FAMILIES = {
    "diffmoe": {},
    "ddpm": {"diffusion__objective": "ddpm"},
    "dense": {"moe__type": "dense"},
    "expert_choice": {"moe__type": "expert_choice"},
    "token_choice": {"moe__type": "token_choice", "moe__top_k": 2},
    "race": {"moe__type": "race", "moe__capacity": 2.0},
    "race_with_targets": {"moe__type": "race", "moe__target_loss_weight": 0.01},
    "promoe": {"moe__type": "promoe", "moe__shared_expert_ratio": 4.0},
    "dsmoe": {"moe__type": "dsmoe", "moe__top_k": 3, "moe__shared_expert_ratio": 1.0},
    "every_block": {"moe__every_block": True},
    "rich": {
        "moe__activation": "swiglu",
        "model__qk_norm": True,
        "model__rope": True,
        "moe__shared_expert_ratio": 1.0,
        "moe__capacity": 2.0,
    },
    "gated": {
        "model__mlp_activation": "swiglu",
        "model__head_width": 48,
        "moe__shared_expert_ratio": 1.0,
        "moe__shared_expert_activation": "swiglu",
    },
    "bytes": {"model__text": {"encoder": "bytes", "length": 96, "width": 128, "depth": 2}},
    "aligned": {"align": {"block": 2, "width": 96, "hidden": 512}},
    "aligned_conv": {"align": {"block": 2, "width": 96, "projector": "conv"}},
    "wide_head": {"model__wide_head": {"width": 256, "depth": 2, "heads": 4}},
    "rich_head": {
        "moe__type": "dense",
        "model__mlp_activation": "swiglu",
        "model__rope": True,
        "model__input_size": 16,
        "model__patch_size": 1,
        "model__wide_head": {"width": 192, "depth": 1, "heads": 4},
    },
    "frozen": {"model__text": {"encoder": "t5", "length": 128, "width": 512, "pooled": 256}},
}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_within_15_percent(family: str, precision: str, checkpointing: bool):
    config = latents(
        training__precision=precision,
        training__activation_checkpointing=checkpointing,
        **FAMILIES[family],
    )
    saved = saved_bytes(config)
    if precision == "bf16" and config.model.qk_norm and not checkpointing:
        saved -= kept_by_norms_on_a_cpu(config)
    assert kept_bytes(Layout(config, 1, 1)) == pytest.approx(saved, rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_wide_head_keeps_is_counted(checkpointing: bool):
    """By itself, so that a large backbone hides nothing."""
    plain = latents(training__activation_checkpointing=checkpointing)
    config = plain.replace({"model.wide_head": {"width": 256, "depth": 2, "heads": 4}})
    planned = kept_bytes(Layout(config, 1, 1)) - kept_bytes(Layout(plain, 1, 1))
    assert planned == pytest.approx(saved_bytes(config) - saved_bytes(plain), rel=0.01)


@pytest.mark.parametrize("family", ["diffmoe", "rich", "token_choice"])
def test_what_lies_between_factors_is_counted(family: str):
    plain = latents(**FAMILIES[family])
    config = plain.replace({"lora": {"rank": 5, "targets": ("attention", "mlp", "experts")}})
    planned = kept_bytes(Layout(config, 1, 1)) - kept_bytes(Layout(plain, 1, 1))
    assert planned == saved_bytes(config) - saved_bytes(plain)


def kept_by_norms_on_a_cpu(config: Config) -> int:
    """What torch's RMS norms of queries and keys keep there beyond their input: steps in fp32."""
    model = config.model
    width, tokens = model.width_of_head, (model.input_size // model.patch_size) ** 2
    x = torch.randn(config.training.batch_size, model.heads, tokens, width, dtype=torch.bfloat16)
    x.requires_grad_()
    norm = torch.nn.RMSNorm(width, dtype=torch.bfloat16)
    with Saved([*norm.parameters(), x]) as saved:
        kept = norm(x)  # held, so that nothing is freed
    del kept
    return 2 * model.depth * saved.bytes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_within_2_percent(family: str, checkpointing: bool):
    config = latents(training__activation_checkpointing=checkpointing, **FAMILIES[family])
    check_operations(config)


# What trains of which model; where no first block does, the backward ends early.
TRAINED = {
    "frozen attention": {"training__freeze": ("*.attention.*",)},
    "frozen experts": {"training__freeze": ("*.experts.*",), **FAMILIES["token_choice"]},
    "frozen embedders": {"training__freeze": ("*_embed.*", "*adaln*", "blocks.0.*")},
    "biases": {"training__train_only": ("*.bias", "*.b_*")},
    "routers": {"training__train_only": ("*.router",), "moe__shared_expert_ratio": 1.0},
    "predictors": {"training__train_only": ("*.capacity_predictor.*",)},
    "the second MLP": {"training__train_only": ("blocks.2.feed_forward.*",)},
    "the last block": {"training__train_only": ("blocks.3.*",)},
    "cross-attention": {
        "training__train_only": ("*.cross_attention.*",),
        **FAMILIES["bytes"],
    },
    "captions": {"training__train_only": ("text_embed.*",), **FAMILIES["bytes"]},
    "the projector": {"training__train_only": ("projector.*",), **FAMILIES["aligned"]},
    "the wide head": {
        "training__train_only": ("wide_head.*", "final*"),
        **FAMILIES["wide_head"],
    },
    "the backbone alone": {"training__freeze": ("wide_head.*",), **FAMILIES["wide_head"]},
    "LoRA of attention": {"lora": {"rank": 16}},
    "LoRA of experts": {"lora": {"rank": 16, "targets": ("experts",)}, **FAMILIES["rich"]},
    "LoRA of the last block": {"lora": {"rank": 16, "targets": ("blocks.3.*",)}},
    "LoRA of all with a head": {
        "lora": {"rank": 32, "targets": ("attention", "mlp", "experts")},
        "training__train_only": ("final.*", "label_embed.*"),
        **FAMILIES["gated"],
    },
    "LoRA of captions": {
        "lora": {"rank": 16, "targets": ("attention", "mlp")},
        **FAMILIES["bytes"],
    },
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", TRAINED)
def test_operations_of_what_trains_are_within_2_percent(trained: str, checkpointing: bool):
    config = latents(training__activation_checkpointing=checkpointing, **TRAINED[trained])
    check_operations(config)


def check_operations(config: Config) -> None:
    forward, step = counted_flops(config)
    layout = Layout(config, 1, 1)
    assert forward_flops(layout) == pytest.approx(forward, rel=0.02)
    # The forward is most of it where little trains: the backward is held apart.
    assert step_flops(layout) - forward_flops(layout) == pytest.approx(step - forward, rel=0.02)


def counted_flops(config: Config) -> tuple[int, int]:
    objective = create_objective(config)
    network = randomize(DiT(config.model, config.moe, align=config.align, lora=config.lora)).train()
    freeze(network, config.training)
    network.checkpoint_activations(config.training.activation_checkpointing)
    lanes = range(config.data.lanes)
    batch = random_batch(config, 0, lanes)
    examples = next(iter(micro_batches(batch, config, lanes, 0, objective)))

    # torch counts the GPU's attention kernels, not the CPU's.
    def attention(query, key, value, *_, out_shape=None, **__) -> int:
        return sdpa_flop(query, key, value)

    def backward(gradient, query, key, value, *_, out_shape=None, **__) -> int:
        return sdpa_backward_flop(gradient, query, key, value)

    def grouped(rows, matrices, *_, out_shape=None, **__) -> int:
        return 2 * rows[0] * rows[1] * matrices[-1]

    ops = torch.ops.aten
    mapping = {
        ops._grouped_mm: grouped,  # which torch does not count
        ops._scaled_dot_product_flash_attention_for_cpu: attention,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        output = network(*examples.inputs)
        forward = counter.get_total_flops()
        loss = objective.loss(
            output.prediction, examples.x_t, examples.data, examples.noise, examples.t
        )["loss"].mean()
        if output.projected is not None:
            targets = alignment_targets(examples.features, config.model.grid, spatial=False)
            loss = loss + alignment_loss(output.projected, targets)
        (loss + routing_loss(output.routing, config.moe)).backward()
    return forward, counter.get_total_flops()
