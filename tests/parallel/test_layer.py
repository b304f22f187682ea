"""The MoE layer alone on ranks equals one process: pools, dispatch and both kinds of experts."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from diffmoe.config import Config
from diffmoe.models.dit import DiT
from diffmoe.models.moe import MoEFeedForward
from diffmoe.parallel.dispatch import Dispatch
from diffmoe.parallel.topology import Topology, create_topology
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import randomize, tiny_config

OTHERS = [pytest.param(*layout, marks=pytest.mark.slow) for layout in [(2, 1), (4, 1), (4, 4)]]
LAYOUTS = [(2, 2), (4, 2), *OTHERS]
INFERENCE = ["per_token", "pooled", "static"]
SAMPLES, TOKENS = 8, 6  # of all ranks; 48 tokens, so K = 12 in the global pool
NUMBERS = dict[str, Tensor]


def make_layer(config: Config, topology: Topology | None = None) -> MoEFeedForward:
    return randomize(DiT(config.model, config.moe, topology)).moe_layers[0].train()


def all_tokens() -> Tensor:
    """Tokens of all ranks; some samples are much larger, so that pools differ from one another."""
    x = torch.randn(SAMPLES, TOKENS, 16, generator=torch.Generator().manual_seed(0))
    return (x * torch.linspace(0.2, 4, SAMPLES)[:, None, None]).double()


def run_layer(layer: MoEFeedForward, x: Tensor, share: float) -> NUMBERS:
    """Outputs and input gradient; share: of the capacity loss, a mean over this rank's tokens."""
    x = x.clone().requires_grad_()
    y, layer_routing = layer(x)
    ((y * y.detach().cos()).sum() + share * layer_routing.losses["capacity"]).backward()
    return {"y": y.detach(), "grad": x.grad, "taken": layer_routing.selected_ES}


def summed_gradients(layer: MoEFeedForward, topology: Topology) -> NUMBERS:
    """Gradients of the sum of all ranks' losses, experts under their global numbers.

    Expert gradients are added over the ranks that hold the same experts alone: those of the
    tokens of the expert-parallel peers are in them already.
    """
    found = {}
    for name, parameter in layer.named_parameters():
        gradient = parameter.grad.clone()
        if not name.startswith("experts."):
            dist.all_reduce(gradient)
        else:
            dist.all_reduce(gradient, group=topology.expert_data_group)
            parts = [torch.empty_like(gradient) for _ in range(topology.expert_parallel)]
            dist.all_gather(parts, gradient, group=topology.expert_group)
            gradient = torch.cat(parts)
        found[name] = gradient
    return found


def pools_of(config: Config, world: int) -> int:
    """How many pools the ranks have."""
    ranks = config.parallel.expert_parallel
    counts = {"micro_batch": world, "expert_parallel": world // ranks, "global": 1}
    return counts[config.moe.token_pool]


def layer_on_rank(configs: list[Config], x: Tensor, device: str) -> list[tuple[NUMBERS, NUMBERS]]:
    topology = create_topology(configs[0].parallel.expert_parallel)
    told = []
    for config in configs:
        layer = make_layer(config, topology).double().to(device)
        mine = x.chunk(topology.world)[topology.rank].to(device)
        share = pools_of(config, topology.world) / topology.world
        told.append((run_layer(layer, mine, share), summed_gradients(layer, topology)))
    return tree_map_only(Tensor, Tensor.cpu, told)


def one_process(config: Config, pools: int) -> tuple[list[NUMBERS], NUMBERS]:
    """All tokens in one layer, in `pools` parts one after the other."""
    layer = make_layer(config).double()
    parts = [run_layer(layer, part, 1) for part in all_tokens().chunk(pools)]
    return parts, {name: parameter.grad for name, parameter in layer.named_parameters()}


def close(actual: Tensor, expected: Tensor, name: str) -> None:
    # float64 rounding of sums of 48 terms of size up to 10; the largest seen is 4e-14.
    torch.testing.assert_close(
        actual, expected, atol=1e-12, rtol=1e-12, msg=lambda message: f"{name}: {message}"
    )


@pytest.mark.parametrize(("world", "ranks"), LAYOUTS)
def test_outputs_and_gradients_equal_one_process_in_every_pool(
    world: int, ranks: int, device: torch.device
):
    """On a GPU all ranks share it, joined by gloo; the one process computes on the CPU."""
    configs = [
        tiny_config(
            parallel__expert_parallel=ranks,
            moe__token_pool=scope,
            moe__activation=activation,
            moe__shared_expert_ratio=shared,
            moe__gate=gate,
        )
        for scope in ("micro_batch", "expert_parallel", "global")
        for activation, shared, gate in (("gelu", 0.0, "identity"), ("swiglu", 2.0, "softmax"))
    ]
    told = run_ranks(world, layer_on_rank, configs, all_tokens(), device.type)
    for config, *ranks_told in zip(configs, *told, strict=True):
        parts, gradients = one_process(config, pools_of(config, world))
        taken = torch.cat([numbers["taken"] for numbers, _ in ranks_told], dim=1)
        assert torch.equal(taken, torch.cat([part["taken"] for part in parts], dim=1))
        assert (taken.sum(dim=1) == SAMPLES * TOKENS // 4).all()
        for key in ("y", "grad"):
            actual = torch.cat([numbers[key] for numbers, _ in ranks_told])
            close(actual, torch.cat([part[key] for part in parts]), key)
        for _, found in ranks_told:
            assert found.keys() == gradients.keys()
            for name, gradient in gradients.items():
                close(found[name], gradient, name)


def many_tokens() -> Tensor:
    """Each expert takes 12 of a rank's: products of fewer than 4 rows round otherwise on some
    processors, and an expert gets the rows of all ranks of its group at once.
    """
    return all_tokens().float().repeat(4, 1, 1).roll(1, dims=0) * torch.linspace(0.5, 1.5, 16)


def bits_on_rank(config: Config) -> Tensor:
    topology = create_topology(config.parallel.expert_parallel)
    layer = make_layer(config, topology)
    return layer(many_tokens().chunk(topology.world)[topology.rank])[0].detach()


@pytest.mark.parametrize("ranks", [2, 4])
def test_default_pool_in_fp32_equals_one_process_bit_for_bit(ranks: int):
    config = tiny_config(parallel__expert_parallel=ranks)
    layer = make_layer(config)
    parts = many_tokens().chunk(4)
    for mine, part in zip(run_ranks(4, bits_on_rank, config), parts, strict=True):
        assert torch.equal(mine, layer(part)[0])


# Zero tokens: for an expert, for a rank, on a rank -------------------------------------------


def crowded_tokens() -> Tensor:
    """The second half of the tokens is zero, so that all its scores are 1/4.

    With `crowded` below, each expert's 12 best of 48 tokens are in the first half.
    """
    x = all_tokens()
    x[: SAMPLES // 2, :, 0] = torch.tensor([3.0, -3.0]).repeat(TOKENS // 2)
    x[SAMPLES // 2 :] = 0
    return x


@torch.no_grad()
def crowded(layer: MoEFeedForward, favorites: tuple[int, ...] = (1, 1, -1, -1)) -> MoEFeedForward:
    """Experts 0 and 1 like a large first entry, 2 and 3 a small one."""
    layer.router.zero_()
    layer.router[:, 0] = torch.tensor(favorites, dtype=layer.router.dtype)
    return layer.double()


def crowded_on_rank(config: Config) -> tuple[NUMBERS, NUMBERS]:
    topology = create_topology(config.parallel.expert_parallel)
    layer = crowded(make_layer(config, topology))
    mine = crowded_tokens().chunk(topology.world)[topology.rank]
    return run_layer(layer, mine, 1 / topology.world), summed_gradients(layer, topology)


@pytest.mark.parametrize(("world", "ranks"), [(2, 2), (4, 4), (4, 2)])
def test_a_wide_pool_that_takes_no_token_of_a_rank_equals_one_process(world: int, ranks: int):
    config = tiny_config(parallel__expert_parallel=ranks, moe__token_pool="global")
    layer = crowded(make_layer(config))
    expected = run_layer(layer, crowded_tokens(), 1)
    told = run_ranks(world, crowded_on_rank, config, timeout=60)
    selected_of_ranks = [numbers["taken"].sum().item() for numbers, _ in told]
    assert selected_of_ranks == [48 // (world // 2)] * (world // 2) + [0] * (world // 2)
    for key in ("y", "grad"):
        close(torch.cat([numbers[key] for numbers, _ in told]), expected[key], key)
    for _, found in told:
        for name, parameter in layer.named_parameters():
            close(found[name], parameter.grad, name)


def lonely_on_rank(config: Config) -> dict[str, Tensor]:
    """All tokens of all ranks choose expert 0."""
    topology = create_topology(config.parallel.expert_parallel)
    layer = crowded(make_layer(config, topology), (9, 0, 0, 0))
    x = all_tokens().chunk(topology.world)[topology.rank]
    x[..., 0] = 1
    x.requires_grad_()
    y, layer_routing = layer(x)
    (y.square().sum() + layer_routing.losses["balance"]).backward()
    assert x.grad.isfinite().all()
    return {
        "counts": layer_routing.selected_ES.sum(dim=1),
        **{name: parameter.grad for name, parameter in layer.experts.named_parameters()},
    }


def test_experts_without_any_token_get_zero_gradients_and_nothing_hangs():
    config = tiny_config(parallel__expert_parallel=2, moe__type="token_choice")
    told = run_ranks(2, lonely_on_rank, config, timeout=60)
    for rank, numbers in enumerate(told):
        assert numbers.pop("counts").tolist() == [24, 0, 0, 0]
        for name, gradient in numbers.items():
            busy = gradient.flatten(1).count_nonzero(dim=1) > 0
            assert busy.tolist() == [rank == 0, False], name


EVALUATIONS = [
    *[{"moe__inference": inference} for inference in INFERENCE],
    {"moe__type": "expert_choice"},
    {"moe__type": "token_choice", "moe__top_k": 2},
]
SPLITS = [(8, 0), (0, 8), (3, 5), (0, 0)]  # samples of ranks 0 and 1


def parts_of(split: tuple[int, int]) -> tuple[Tensor, Tensor]:
    x = all_tokens()[: sum(split)]
    return x[: split[0]], x[split[0] :]


def evaluated(layer: MoEFeedForward, x: Tensor) -> Tensor:
    layer.double().eval()
    if layer.capacity_predictor is not None:
        layer.capacity_predictor.thresholds.fill_(0.5)
    y, _ = layer(x.clone().requires_grad_())
    y.sum().backward()  # a hang in the backward would show
    return y.detach()


def evaluate_on_rank(ranks: int, device: str) -> list[list[Tensor]]:
    topology = create_topology(ranks)
    return [
        [
            evaluated(
                make_layer(tiny_config(parallel__expert_parallel=ranks, **changes), topology).to(
                    device
                ),
                parts_of(split)[topology.rank].to(device),
            ).cpu()
            for split in SPLITS
        ]
        for changes in EVALUATIONS
    ]


def test_evaluation_of_uneven_batches_equals_one_process_with_no_samples_on_a_rank_too(
    device: torch.device,
):
    told = run_ranks(2, evaluate_on_rank, 2, device.type, timeout=60)
    for changes, *ranks_told in zip(EVALUATIONS, *told, strict=True):
        for split, *parts in zip(SPLITS, *ranks_told, strict=True):
            # Each rank's batch by itself, as one process evaluates it.
            for mine, x in zip(parts, parts_of(split), strict=True):
                expected = evaluated(make_layer(tiny_config(**changes)), x)
                assert mine.shape == (len(x), TOKENS, 16)
                close(mine, expected, f"{changes} {split}")
            if changes.get("moe__inference") == "per_token" and sum(split):
                whole = evaluated(make_layer(tiny_config(**changes)), all_tokens())
                close(torch.cat(parts), whole, f"{changes} {split} in one batch")


# The exchange alone --------------------------------------------------------------------------


class Stamp:
    """Stands for the experts of a rank: writes the global expert number beside each row."""

    def __init__(self, rank: int, experts: int) -> None:
        self.numbers = torch.arange(rank * experts, (rank + 1) * experts)

    def __call__(self, rows: Tensor, counts_e: Tensor | None) -> Tensor:
        if counts_e is None:
            stamps = self.numbers[:, None, None].expand(rows.shape)
        else:
            stamps = self.numbers.repeat_interleave(counts_e)[:, None].expand(rows.shape)
        return rows * 1 + 1000 * stamps


RAGGED = [[3, 0, 1, 2], [0, 0, 0, 0], [0, 5, 0, 0], [1, 1, 1, 1]]  # by rank, by expert


def exchange_on_rank(ranks: int) -> dict[str, Tensor]:
    topology = create_topology(ranks)
    dispatch: Dispatch = topology.dispatch()
    stamp = Stamp(topology.expert_rank, 4 // ranks)
    counts = torch.tensor(RAGGED[topology.rank])
    ragged = torch.arange(float(counts.sum()))[:, None].repeat(1, 3).requires_grad_()
    static = torch.arange(4 * 2 * 3.0).view(4, 2, 3).requires_grad_()
    from_ragged = dispatch.ragged(ragged, counts, stamp)
    from_static = dispatch.static(static, stamp)
    # A plain sum has a broadcast gradient, which the all-to-all must lay out.
    from_ragged.sum().backward()
    from_static.sum().backward()
    return {
        "ragged": from_ragged.detach() - ragged.detach(),
        "static": from_static.detach() - static.detach(),
        "ragged grad": ragged.grad,
        "static grad": static.grad,
    }


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_row_meets_its_expert_and_comes_back_to_its_place(ranks: int):
    for counts, told in zip(RAGGED, run_ranks(4, exchange_on_rank, ranks), strict=True):
        by_row = torch.arange(4).repeat_interleave(torch.tensor(counts))
        assert torch.equal(told["ragged"], 1000.0 * by_row[:, None].expand(-1, 3))
        assert torch.equal(told["static"], 1000.0 * torch.arange(4)[:, None, None].expand(4, 2, 3))
        assert (told["ragged grad"] == 1).all()
        assert (told["static grad"] == 1).all()
