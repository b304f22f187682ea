"""Small networks in one process: what they compute, what they leave alone, how they start."""

import pytest
import torch
from torch import Tensor, nn

from diffmoe.models import routing
from diffmoe.models.blocks import rotary_angles, rotate
from diffmoe.models.dit import DiT, DiTOutput
from diffmoe.models.moe import routing_loss
from diffmoe.parallel.topology import Topology
from diffmoe.training.routing_state import RoutingState
from tests.helpers.networks import examples
from tests.helpers.tiny import randomize, tiny_config

INFERENCE = ["per_token", "pooled", "static"]


def tiny_network(**changes) -> DiT:
    config = tiny_config(**changes)
    return randomize(DiT(config.model, config.moe)).train()


def loss_of(network: DiT, output: DiTOutput) -> Tensor:
    return output.prediction.square().mean() + routing_loss(output.routing, network.moe_config)


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and of all buffers, also of those that are not saved."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


@pytest.mark.parametrize("inference", INFERENCE)
def test_a_network_evaluates_no_samples(inference: str):
    network = tiny_network(moe__inference=inference).eval()
    output = network(*examples(0))
    assert output.prediction.shape == (0, 2, 8, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe__activation": "swiglu", "moe__every_block": True},
        {"moe__shared_expert_ratio": 2.0, "moe__capacity": 2.0},
        {"model__rope": True, "model__qk_norm": True},
        {"moe__type": "expert_choice"},
        {"moe__type": "token_choice", "moe__top_k": 2},
        {"moe__type": "dense"},
        {"model__wide_head": {"width": 20, "heads": 2}},
    ],
    ids=str,
)
def test_activation_checkpointing_changes_no_bit_and_routes_once(changes: dict, monkeypatch):
    calls = []
    scores = routing.router_scores
    monkeypatch.setattr(routing, "router_scores", lambda *a: calls.append(1) or scores(*a))
    told = []
    for active in (False, True):
        network = tiny_network(**changes)
        network.checkpoint_activations(active)
        tracker = RoutingState(network)
        calls.clear()
        output = network(*examples(4))
        tracker.observe(output.routing)
        loss_of(network, output).backward()
        tracker.step(tracker.seen())
        assert len(calls) == len(network.moe_layers)
        told.append([output.prediction.detach(), *gradients(network).values()])
        if network.moe_config.type == "diffmoe":
            assert network.thresholds_LE.count_nonzero() > 0
            told[-1].append(network.thresholds_LE)
    for with_all_kept, with_recomputation in zip(*told, strict=True):
        assert torch.equal(with_all_kept, with_recomputation)


def test_activation_checkpointing_keeps_less_for_the_backward():
    kept = []
    for active in (False, True):
        network = tiny_network()
        network.checkpoint_activations(active)
        parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        numbers = {}

        def pack(tensor: Tensor, numbers=numbers, parameters=parameters) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                numbers[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = network(*examples(16))  # held, so that no storage is used twice
        del output
        kept.append(sum(numbers.values()))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("inference", INFERENCE)
@pytest.mark.parametrize("family", ["diffmoe", "expert_choice", "token_choice"])
@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_leaves_every_buffer_and_parameter_unchanged(
    family: str, inference: str, grad: bool
):
    network = tiny_network(moe__type=family, moe__inference=inference).eval()
    before = state(network)
    with torch.set_grad_enabled(grad):
        for samples in (1, 5):
            output = network(*examples(samples))
    if grad:
        output.prediction.sum().backward()
    after = state(network)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_thresholds_move_only_when_the_tracker_steps():
    network = tiny_network()
    tracker = RoutingState(network)
    tracker.observe(network(*examples(4)).routing)
    assert (network.thresholds_LE == 0).all()
    tracker.step(tracker.seen())
    moved = network.thresholds_LE
    assert (moved > 0).all()
    tracker.step(tracker.seen())  # nothing observed since
    assert torch.equal(network.thresholds_LE, moved)


def calibrated(inference: str, samples: int = 32) -> DiT:
    """A network whose thresholds are the K-th largest probabilities of some other samples."""
    network = tiny_network(moe__inference=inference, moe__threshold_ema=0.0)
    tracker = RoutingState(network)
    tracker.observe(network(*examples(samples, seed=1)).routing)
    tracker.step(tracker.seen())
    return network.eval()


@torch.no_grad()
def alone_and_in_batch(network: DiT, batch: list[int]) -> tuple[list[list[bool]], list[float]]:
    """For each sample of a batch: are its pairs those it has alone; how far apart are outputs."""
    inputs = examples(8, seed=2)
    together = network(*(part[batch] for part in inputs))
    same, apart = [], []
    for place, sample in enumerate(batch):
        alone = network(*(part[sample : sample + 1] for part in inputs))
        mine = slice(16 * place, 16 * place + 16)
        pairs = zip(alone.routing, together.routing, strict=True)
        same.append([torch.equal(a.selected_ES, b.selected_ES[:, mine]) for a, b in pairs])
        apart.append((alone.prediction[0] - together.prediction[place]).abs().max().item())
    return same, apart


@pytest.mark.parametrize("batch", [[0, 1, 2, 3, 4, 5, 6, 7], [5, 2], [3, 3, 3], [7, 1, 4]], ids=str)
def test_per_token_gives_a_sample_the_same_pairs_and_output_in_any_batch(batch: list[int]):
    same, apart = alone_and_in_batch(calibrated("per_token"), batch)
    assert all(layer for sample in same for layer in sample)
    assert max(apart) < 1e-5  # products of other row counts round differently


@pytest.mark.parametrize("inference", ["pooled", "static"])
def test_pooled_and_static_inference_depend_on_the_batch(inference: str):
    same, apart = alone_and_in_batch(calibrated(inference), list(range(8)))
    assert not all(layer for sample in same for layer in sample)
    assert max(apart) > 1e-3


def test_per_token_takes_about_capacity_once_calibrated():
    network = calibrated("per_token")
    with torch.no_grad():
        output = network(*examples(32, seed=3))
    for layer in output.routing:
        # 512 tokens like those of the calibration; 4 experts with C = 1 take one each on average.
        assert layer.selected_ES.sum() / 512 == pytest.approx(1.0, abs=0.3)


def test_inference_is_per_token_unless_said_otherwise():
    network = DiT(tiny_config().model, tiny_config().moe)
    assert [layer.inference for layer in network.moe_layers] == ["per_token"] * 2


VARIANTS = {
    "plain": {},
    "qk_norm": {"model__qk_norm": True},
    "rope": {"model__rope": True},
    "every_block": {"moe__every_block": True},
    "shared expert": {"moe__shared_expert_ratio": 8.0},
    "swiglu": {"moe__activation": "swiglu"},
    "narrow experts": {"moe__experts": 16, "moe__expert_ratio": 0.5, "moe__capacity": 4.0},
    "learn_sigma": {"model__learn_sigma": True},
    "expert choice": {"moe__type": "expert_choice"},
    "token choice": {"moe__type": "token_choice", "moe__top_k": 2},
    "dense": {"moe__type": "dense"},
    "wide head": {"model__wide_head": {"width": 20, "heads": 2}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_of_every_variant_lowers_the_loss_and_reaches_every_parameter(variant: str):
    network = tiny_network(**VARIANTS[variant])
    mixtures = {"every_block": 4, "dense": 0}.get(variant, 2)
    assert len(network.moe_layers) == mixtures
    batch = examples(8)
    output = network(*batch)
    assert output.prediction.shape == (8, 4 if variant == "learn_sigma" else 2, 8, 8)
    loss = loss_of(network, output)
    loss.backward()
    for name, gradient in gradients(network).items():
        assert gradient.isfinite().all(), name
        assert gradient.count_nonzero() > 0, name
    torch.optim.SGD(network.parameters(), lr=1e-3).step()
    assert loss_of(network, network(*batch)) < loss


@torch.no_grad()
def test_a_bf16_network_routes_in_fp32_and_stays_close_to_fp32():
    # C = E: all experts take all tokens, so that no rounding changes a choice.
    exact, rounded = (tiny_network(moe__capacity=4.0) for _ in range(2))
    rounded.bfloat16()
    for name, buffer in rounded.named_buffers():
        buffer.data = exact.get_buffer(name).clone()  # as create_engine does
    for mine, theirs in zip(exact.parameters(), rounded.parameters(), strict=True):
        mine.copy_(theirs)
    batch = examples(8)
    expected, output = exact(*batch), rounded(*batch)
    assert output.prediction.dtype == torch.float32
    for layer in output.routing:
        assert layer.capacity_logits_SE.dtype == layer.losses["capacity"].dtype == torch.float32
    # bf16 keeps 8 bits; a few roundings per block over 4 blocks stay below 4 units of them.
    scale = expected.prediction.abs().max().item()
    torch.testing.assert_close(
        output.prediction, expected.prediction, atol=4 * 2**-8 * scale, rtol=0
    )


def rotated_scores(grid: int, head_width: int) -> Tensor:
    """Dot products of one query at every token with one key at every token. (y, x, y', x')"""
    query, key = torch.randn(2, head_width, generator=torch.Generator().manual_seed(0))
    rotation = rotary_angles((grid, grid), head_width)
    T = grid * grid
    products = rotate(query.expand(T, -1), rotation) @ rotate(key.expand(T, -1), rotation).t()
    return products.view(grid, grid, grid, grid)


@pytest.mark.parametrize("head_width", [4, 8, 16])
def test_rotary_attention_depends_on_relative_positions_only(head_width: int):
    products = rotated_scores(5, head_width)
    # fp32 cosines of angles up to 4, on sums of up to 16 terms of size 1.
    close = {"atol": 5e-6, "rtol": 0}
    torch.testing.assert_close(products[1:, :, 1:, :], products[:-1, :, :-1, :], **close)
    torch.testing.assert_close(products[:, 1:, :, 1:], products[:, :-1, :, :-1], **close)
    # It does depend on both axes, each in its own way, and on the direction.
    right, left, down = products[0, 0, 0, 1], products[0, 1, 0, 0], products[0, 0, 1, 0]
    here = products[0, 0, 0, 0]
    for one, other in [(right, here), (down, here), (right, left), (right, down)]:
        assert (one - other).abs() > 1e-2


def test_rotation_keeps_lengths_and_types_and_leaves_the_first_token_alone():
    x = torch.randn(2, 3, 25, 8)
    turned = rotate(x, rotary_angles((5, 5), 8))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])  # token 0 is at (0, 0)
    assert rotate(x.bfloat16(), rotary_angles((5, 5), 8)).dtype == torch.bfloat16


def initialized(topology: Topology | None = None, **changes) -> DiT:
    config = tiny_config(model__width=64, model__qk_norm=True, **changes)
    return DiT(config.model, config.moe, topology).initialize(seed=3)


def test_tokens_reach_every_block_row_by_row():
    """Sums keep their first term's layout: that of the patches would slow all blocks down."""
    config = tiny_config()
    network = randomize(DiT(config.model, config.moe)).train()
    seen = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    network(torch.randn(4, 2, 8, 8), torch.rand(4), torch.arange(4))
    assert seen == [True] * config.model.depth


def test_initialization_is_that_of_dit_and_of_the_release():
    network = initialized(moe__shared_expert_ratio=2.0)
    expert_names = network.expert_parameters()
    seen = set()
    for name, parameter in network.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if "_norm." in name:
            assert (parameter == 1).all(), name
        elif leaf.startswith("b") or ".adaln." in name or name.startswith("final"):
            assert (parameter == 0).all(), name
        elif leaf == "router" or name.startswith(("timestep_embed", "label_embed")):
            std = 0.006 if leaf == "router" else 0.02
            # The deviation of n draws lies within 4 / sqrt(2 n) of it, in all but 1 of 16,000.
            off = 4 / (2 * parameter.numel()) ** 0.5
            assert parameter.std().item() == pytest.approx(std, rel=off), name
        else:
            matrices = parameter if name in expert_names else [parameter]
            for matrix in matrices:
                rows, columns = matrix.flatten(1).shape
                bound = (6 / (rows + columns)) ** 0.5
                assert 0.97 * bound < matrix.abs().max().item() <= bound, name
        seen.add(leaf)
    assert {"w_in", "w_out", "b_in", "b_out", "router"} <= seen


def test_a_fresh_network_predicts_zero():
    network = initialized()
    assert (network(*examples(2)).prediction == 0).all()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_initial_experts_do_not_depend_on_how_many_ranks_share_them(activation: str):
    whole = initialized(moe__activation=activation)
    experts = whole.expert_parameters()
    assert len(experts) == 2 * (4 if activation == "gelu" else 3)
    for rank in range(2):
        part = initialized(
            Topology(expert_parallel=2, expert_rank=rank), moe__activation=activation
        )
        assert part.parameter_count() == whole.parameter_count()
        for name, parameter in part.named_parameters():
            expected = whole.get_parameter(name)
            if name in experts:
                assert len(parameter) == 2
                expected = expected[2 * rank : 2 * rank + 2]
            assert torch.equal(parameter, expected), name


def test_no_two_experts_nor_two_layers_start_equal():
    network = initialized()
    matrices = [m for layer in network.moe_layers for m in layer.experts.w_in]
    assert len({m.detach().numpy().tobytes() for m in matrices}) == len(matrices) == 8
    again = initialized()
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rotary_positions_are_where_the_network_is_though_linspace_were_not(monkeypatch):
    """transformers makes torch.linspace forget the device context, for good if it came first."""
    on_cpu, linspace = {"device": "cpu"}, torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **how: linspace(*args, **on_cpu | how))
    config = tiny_config(model__rope=True)
    with torch.device("meta"):
        network = DiT(config.model, config.moe)
    assert network.rotation.is_meta
