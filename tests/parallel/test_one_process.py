"""Oracle 2: training on ranks equals one plain process, without DeepSpeed, to rounding."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe.checkpoints.network import routing_buffers
from diffmoe.config import Config
from diffmoe.data.examples import micro_batches
from diffmoe.diffusion import create_objective
from diffmoe.models.alignment import alignment_loss, alignment_targets
from diffmoe.models.dit import DiT
from diffmoe.models.frozen import freeze, frozen_names
from diffmoe.models.moe import routing_loss
from diffmoe.parallel.topology import create_topology
from diffmoe.parallel.zero import create_engine, engine_settings
from diffmoe.training.routing_state import RoutingState
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import BYTES, FROZEN, random_batch, randomize, tiny_config

STEPS, LR, CLIP = 3, 0.5, 0.3
SLOW = pytest.mark.slow
FAST = [(2, 2, 1), (4, 2, 2)]
LAYOUTS = [
    pytest.param(world, ranks, stage, marks=[] if (world, ranks, stage) in FAST else SLOW)
    for world, ranks in [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
    for stage in (1, 2)
]


def loss_of(output: Any, examples: Any, config: Config, objective: Any) -> Tensor:
    loss = objective.loss(
        output.prediction, examples.x_t, examples.data, examples.noise, examples.t
    )["loss"].mean()
    if examples.features is not None:
        targets = alignment_targets(examples.features, config.model.grid, spatial=False)
        loss = loss + config.align.weight * alignment_loss(output.projected, targets)
    return loss + routing_loss(output.routing, config.moe)


def one_process(config: Config, pools: int = 1) -> dict[str, Any]:
    """Plain torch: whole batch (in `pools` parts, one after the other), SGD, torch's clipping."""
    objective = create_objective(config)
    network = randomize(DiT(config.model, config.moe, align=config.align, lora=config.lora))
    freeze(network, config.training)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR)
    trackers = [RoutingState(network) for _ in range(pools)]
    lanes = config.data.lanes // pools
    told: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = []
        for part, tracker in enumerate(trackers):
            mine = range(part * lanes, (part + 1) * lanes)
            batch = random_batch(config, step, mine)
            for examples in micro_batches(batch, config, mine, step, objective):
                output = network(*examples.inputs)
                loss = loss_of(output, examples, config, objective)
                loss = loss / pools / config.training.accumulation
                loss.backward()
                losses.append(loss.detach())
                tracker.observe(output.routing)
        told["losses"].append(sum(losses).item())
        told["norms"].append(torch.nn.utils.clip_grad_norm_(trained, CLIP).item())
        optimizer.step()
        if any(tracker.seen().numel() for tracker in trackers):
            network.move_routing_state(torch.stack([t.seen() for t in trackers]).mean(dim=0))
        for tracker in trackers:
            tracker.forget()
    told["weights"] = {name: p.detach() for name, p in network.named_parameters()}
    told["state"] = dict(routing_buffers(network))
    return told


def on_rank(config: Config, offload: bool = False) -> dict[str, Any]:
    """The same through topology, engine and ZeRO; weights are this rank's."""
    zero = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    objective = create_objective(config)
    topology = create_topology(config.parallel.expert_parallel)
    network = DiT(config.model, config.moe, topology, align=config.align, lora=config.lora)
    randomize(network).train()
    freeze(network, config.training)
    engine = create_engine(
        network,
        experts=network.expert_parameters(),
        num_experts=config.moe.experts,
        optimizer=torch.optim.SGD,
        optimizer_options={"lr": LR},
        settings=engine_settings(config, {"zero_optimization": zero}, topology.world),
        topology=topology,
    )
    tracker = RoutingState(network)
    lanes = config.data.lanes // topology.world
    mine = range(topology.rank * lanes, (topology.rank + 1) * lanes)
    told: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        total = torch.zeros(())
        for examples in micro_batches(
            random_batch(config, step, mine), config, mine, step, objective
        ):
            output = engine(*examples.inputs)
            loss = loss_of(output, examples, config, objective)
            engine.backward(loss)
            engine.step()
            tracker.observe(output.routing)
            total += loss.detach() / config.training.accumulation
        kth_LE = tracker.seen()
        dist.all_reduce(total)
        dist.all_reduce(kth_LE)
        tracker.step(kth_LE / topology.world)
        told["losses"].append(total.item() / topology.world)
        told["norms"].append(float(engine.get_global_grad_norm()))
    experts = network.expert_parameters()
    told["weights"] = {
        name: (p.detach().clone(), topology.expert_rank * len(p) if name in experts else None)
        for name, p in network.named_parameters()
    }
    told["state"] = dict(routing_buffers(network))
    told["optimized"] = [p.numel() for group in engine.optimizer.bit16_groups for p in group]
    return told


def compare(ranks: list[dict[str, Any]], expected: dict[str, Any], tolerance: float = 1e-6):
    for rank in ranks:
        assert rank["losses"] == pytest.approx(expected["losses"], abs=tolerance)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        torch.testing.assert_close(rank["state"], expected["state"], atol=tolerance, rtol=0)
        for name, (weight, first) in rank["weights"].items():
            whole = expected["weights"][name]
            part = whole if first is None else whole[first : first + len(weight)]
            torch.testing.assert_close(
                weight, part, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(("world", "ranks", "stage"), LAYOUTS)
@pytest.mark.parametrize("kind", ["gelu_flow", "swiglu_ddpm"])
def test_global_pool_equals_one_process_on_any_layout(
    kind: str, world: int, ranks: int, stage: int
):
    config = tiny_config(
        moe__token_pool="global",
        moe__activation=kind.split("_")[0],
        diffusion__objective=kind.split("_")[1],
        model__learn_sigma=kind.endswith("ddpm"),
        optimizer__gradient_clipping=CLIP,
        parallel__expert_parallel=ranks,
        parallel__zero_stage=stage,
    )
    expected = one_process(config)
    assert min(expected["norms"]) > CLIP  # clipping acts
    compare(run_ranks(world, on_rank, config), expected)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=SLOW), 2, pytest.param(4, marks=SLOW)])
def test_micro_batch_pool_equals_one_process_with_as_many_pools(ranks: int):
    config = tiny_config(
        optimizer__gradient_clipping=CLIP, parallel__expert_parallel=ranks, moe__capacity=2.0
    )
    compare(run_ranks(4, on_rank, config), one_process(config, pools=4))


@pytest.mark.parametrize("family", ["expert_choice", "token_choice"])
def test_baselines_equal_one_process(family: str):
    # Token choice is ragged between ranks; its balancing loss is a rank's own, so it is off here.
    config = tiny_config(
        moe__type=family,
        moe__aux_loss_weight=0.0,
        optimizer__gradient_clipping=CLIP,
        parallel__expert_parallel=2,
    )
    compare(run_ranks(2, on_rank, config), one_process(config))


@pytest.mark.parametrize(
    ("world", "ranks", "stage", "offload"),
    [(1, 1, 1, False), (2, 1, 2, False), (2, 2, 1, False), (2, 1, 1, True), (2, 2, 2, True)],
)
@pytest.mark.parametrize(
    "patterns",
    [
        {"training__freeze": ("blocks.1.*", "*.experts.w_out", "*.qkv.*")},
        {"training__freeze": ("*.experts.*",)},  # then DeepSpeed knows of no experts
        {"training__train_only": ("blocks.3.feed_forward.experts.*",)},  # and here of nothing else
        {"lora": {"rank": 2, "alpha": 3.0, "targets": ("attention", "mlp", "experts")}},
        {"lora": {"rank": 8, "targets": ("experts",)}, "training__train_only": ("final.*",)},
    ],
)
def test_frozen_parameters_stay_and_the_others_equal_one_process(
    patterns: dict, world: int, ranks: int, stage: int, offload: bool
):
    config = tiny_config(
        moe__token_pool="global",
        optimizer__gradient_clipping=CLIP,
        parallel__expert_parallel=ranks,
        parallel__zero_stage=stage,
        **patterns,
    )
    expected = one_process(config)
    before = randomize(DiT(config.model, config.moe, lora=config.lora))
    frozen = frozen_names(before, config.training)
    for name, parameter in before.named_parameters():
        assert torch.equal(expected["weights"][name], parameter) == (name in frozen), name
    told = run_ranks(world, on_rank, config, offload)
    compare(told, expected)
    for rank in told:
        assert len(rank["optimized"]) == sum(name not in frozen for name in rank["weights"])
        for name, (weight, first) in rank["weights"].items():
            if name in frozen:
                whole = expected["weights"][name]
                part = whole if first is None else whole[first : first + len(weight)]
                assert torch.equal(weight, part), name


NEWER = {
    "race": {"moe__token_pool": "global", "moe__similarity_loss_weight": 0.1},
    # Its contrastive loss is a rank's own, so it is off here.
    "promoe": {"moe__contrastive_loss_weight": 0.0, "training__label_dropout": 0.4},
    "dsmoe": {"moe__top_k": 2, "moe__balance_rate": 0.01, "moe__z_loss_weight": 0.1},
}


@pytest.mark.parametrize(
    ("world", "ranks", "stage"),
    [
        (2, 2, 1),
        *[pytest.param(*layout, marks=SLOW) for layout in [(2, 1, 2), (4, 2, 1), (4, 4, 2)]],
    ],
)
@pytest.mark.parametrize("family", NEWER)
def test_newer_families_equal_one_process(family: str, world: int, ranks: int, stage: int):
    config = tiny_config(
        moe__type=family,
        **NEWER[family],
        optimizer__gradient_clipping=CLIP,
        parallel__expert_parallel=ranks,
        parallel__zero_stage=stage,
    )
    expected = one_process(config)
    assert all(moved.count_nonzero() > 0 for moved in expected["state"].values())
    compare(run_ranks(world, on_rank, config), expected)


@pytest.mark.parametrize(
    ("world", "ranks", "stage"),
    [pytest.param(2, 1, 1, marks=SLOW), (2, 2, 2), pytest.param(4, 2, 1, marks=SLOW)],
)
@pytest.mark.parametrize("text", [BYTES, FROZEN], ids=lambda text: text["encoder"])
def test_a_text_model_equals_one_process(text: dict, world: int, ranks: int, stage: int):
    config = tiny_config(
        model__text=text,
        moe__token_pool="global",
        training__label_dropout=0.5,
        optimizer__gradient_clipping=CLIP,
        parallel__expert_parallel=ranks,
        parallel__zero_stage=stage,
    )
    expected = one_process(config)
    assert min(expected["norms"]) > CLIP
    compare(run_ranks(world, on_rank, config), expected)


@pytest.mark.parametrize(
    ("world", "ranks", "stage"), [pytest.param(2, 1, 1, marks=SLOW), (2, 2, 2)]
)
def test_an_aligned_model_equals_one_process(world: int, ranks: int, stage: int):
    config = tiny_config(
        align={"block": 2, "width": 6, "hidden": 10, "weight": 2.0},
        moe__token_pool="global",
        optimizer__gradient_clipping=CLIP,
        parallel__expert_parallel=ranks,
        parallel__zero_stage=stage,
    )
    expected = one_process(config)
    assert sum(name.startswith("projector.") for name in expected["weights"]) == 6
    assert min(expected["norms"]) > CLIP
    compare(run_ranks(world, on_rank, config), expected)


@pytest.mark.parametrize(
    ("world", "ranks", "stage"), [pytest.param(2, 1, 2, marks=SLOW), (2, 2, 1)]
)
def test_a_model_with_a_wide_head_equals_one_process(world: int, ranks: int, stage: int):
    config = tiny_config(
        model__wide_head={"width": 20, "depth": 2, "heads": 2},
        moe__token_pool="global",
        optimizer__gradient_clipping=CLIP,
        parallel__expert_parallel=ranks,
        parallel__zero_stage=stage,
    )
    expected = one_process(config)
    head = [name for name in expected["weights"] if name.startswith("wide_head.")]
    assert len(head) == 2 + 2 + 2 * 10
    assert min(expected["norms"]) > CLIP
    compare(run_ranks(world, on_rank, config), expected)
