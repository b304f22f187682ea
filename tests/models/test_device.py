"""On a GPU the network computes what it does on a CPU, and a step waits for nothing there.

The second is held on the meta device, which has no values: an operation that mixes in a tensor of
the CPU, or reads a value, shows at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental import _config as shapes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffmoe.config import Config
from diffmoe.data.examples import Examples, micro_batches
from diffmoe.diffusion import create_objective
from diffmoe.diffusion.guidance import guided
from diffmoe.diffusion.samplers import sample_flow
from diffmoe.models.dit import DiT
from diffmoe.training.routing_metrics import RoutingMetrics
from diffmoe.training.routing_state import RoutingState
from diffmoe.training.step import losses_of
from diffmoe.tree import tree_map
from tests.helpers.networks import ALL_FAMILIES, ALL_WAYS, set_thresholds, tiny_layer, tokens
from tests.helpers.tiny import BYTES, random_batch, randomize, tiny_config

# Families and options that take other operations.
VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {"moe__type": family} for family in [*ALL_FAMILIES, "dense"]},
    "every block, swiglu, shared": {
        "moe__every_block": True,
        "moe__activation": "swiglu",
        "moe__shared_expert_ratio": 2.0,
        "moe__gate": "identity",
    },
    "router sees the time": {"moe__router_input": "plain_with_time", "moe__z_loss_weight": 1e-3},
    "race, with a target": {"moe__type": "race", "moe__target_loss_weight": 0.1},
    "rope": {"model__rope": True, "model__qk_norm": True},
    "text": {"model__text": BYTES},
    "ddpm": {"diffusion__objective": "ddpm", "model__learn_sigma": True},
    "checkpointing": {"training__activation_checkpointing": True},
}


def network_on(device: torch.device, config: Config) -> DiT:
    network = randomize(DiT(config.model, config.moe))
    network.checkpoint_activations(config.training.activation_checkpointing)
    set_thresholds(network)
    return network.to(device).train()


def examples_on(device: torch.device, config: Config) -> Examples:
    lanes = range(config.data.lanes)
    objective = create_objective(config)
    (examples,) = micro_batches(random_batch(config, 0, lanes), config, lanes, 0, objective)
    return tree_map(lambda tensor: tensor.to(device), examples)


def loss_and_gradients(network: DiT, config: Config, device: torch.device) -> dict[str, Tensor]:
    objective = create_objective(config)
    loss, parts, routing = losses_of(network, objective, examples_on(device, config), config)
    loss.backward()
    state = RoutingState(network)
    state.observe(routing)
    found = {name: part.detach() for name, part in parts.items()}
    found |= {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    found |= {f"selected {i}": layer.selected_ES for i, layer in enumerate(routing)}
    return {name: tensor.cpu() for name, tensor in (found | {"state": state.seen()}).items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_equals_that_of_a_cpu(variant: str, device: torch.device):
    config = tiny_config(**VARIANTS[variant])
    found = loss_and_gradients(network_on(device, config), config, device)
    cpu = torch.device("cpu")
    expected = loss_and_gradients(network_on(cpu, config), config, cpu)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape
        scale = max([1.0, *wanted.double().abs().flatten().tolist()])
        # Sums of up to 128 terms in another order, through four blocks.
        torch.testing.assert_close(found[name], wanted, atol=2e-5 * scale, rtol=0, msg=name)


@pytest.mark.parametrize("way", ALL_WAYS, ids=str)
def test_every_way_of_routing_equals_that_of_a_cpu_in_double(way, device: torch.device):
    found = []
    for place in (device, torch.device("cpu")):
        layer = tiny_layer(way, moe__shared_expert_ratio=2.0).double().to(place)
        x = tokens(3, 10).detach().double().to(place).requires_grad_()
        y, routed = layer(x)
        used = [x, *(p for p in layer.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad((y * y.detach().cos()).sum(), used, allow_unused=True)
        told = [y.detach(), routed.selected_ES, *gradients]
        found.append([tensor.cpu() for tensor in told if tensor is not None])
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=1e-12)


class OneDevice(TorchDispatchMode):
    """Fails on a tensor of the CPU, and counts what waits for values."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                assert given.device.type == "meta", f"{function} got a tensor of the CPU"
        name = str(function)
        assert "_local_scalar_dense" not in name, "a value is read"
        self.waits += name.startswith("aten.nonzero") and "static" not in name
        return function(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[OneDevice]:
    """nonzero gives all places there, for want of values."""
    before, shapes.meta_nonzero_assume_all_nonzero = shapes.meta_nonzero_assume_all_nonzero, True
    try:
        with OneDevice() as mode:
            yield mode
    finally:
        shapes.meta_nonzero_assume_all_nonzero = before


META = torch.device("meta")


def on_meta_network(config: Config, bf16: bool) -> DiT:
    """Parameters in bf16, as the engine has them; the routing's state stays in fp32."""
    network = network_on(META, config)
    if bf16:
        for parameter in network.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return network


# Of a layer: how many tokens have no condition decides shapes.
WAITS = {"promoe": 2}
UNEQUAL = ("race", "token_choice", "promoe", "dsmoe")
KNOWN_IN_BF16 = "what shape a grouped product has on the meta device, torch knows in bf16 alone"


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_touches_no_tensor_of_the_cpu_and_waits_for_no_value(variant: str, bf16: bool):
    config = tiny_config(**VARIANTS[variant])
    if config.moe.type in UNEQUAL and not bf16:
        pytest.skip(KNOWN_IN_BF16)
    network = on_meta_network(config, bf16)
    objective, examples = create_objective(config), examples_on(META, config)
    state, metrics = RoutingState(network), RoutingMetrics(network)
    if config.model.learn_sigma:  # the first use copies the tables of the schedule
        given = (examples.x_t, examples.data, examples.noise, examples.t)
        objective.loss(torch.cat([examples.noise] * 2, dim=1), *given)
    with on_meta() as mode:
        loss, _, routing = losses_of(network, objective, examples, config)
        (loss * torch.where(loss.isfinite(), 1.0, torch.nan)).backward()
        state.observe(routing)
        metrics.observe(routing, examples.t)
        metrics.flat()
        seen = state.seen()
        if seen.numel():
            state.step(seen)
    layers = len(network.moe_layers)
    assert mode.waits == WAITS.get(config.moe.type, 0) * layers
    assert all(p.grad.device == META for p in network.parameters())


# Where thresholds alone decide, how many pairs there are does, too.
INFERENCE = {
    "static": (0, {"moe__inference": "static"}),
    "per_token": (1, {"moe__inference": "per_token"}),
    "pooled": (1, {"moe__inference": "pooled"}),
    "race, static": (0, {"moe__type": "race", "moe__inference": "static"}),
    "race": (1, {"moe__type": "race"}),
    "expert_choice": (0, {"moe__type": "expert_choice"}),
    "token_choice": (0, {"moe__type": "token_choice", "moe__top_k": 2}),
    "dsmoe": (0, {"moe__type": "dsmoe", "moe__top_k": 2}),
    "promoe": (2, {"moe__type": "promoe"}),
    "dense": (0, {"moe__type": "dense"}),
}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", INFERENCE)
def test_sampling_touches_no_tensor_of_the_cpu_and_waits_once_a_ragged_layer(way: str, bf16: bool):
    waits, changes = INFERENCE[way]
    if not bf16 and way in (*UNEQUAL, "per_token", "pooled", "race, static"):
        pytest.skip(KNOWN_IN_BF16)
    # Meta tensors take their time: few blocks, all of them with experts.
    config = tiny_config(model__depth=2, moe__every_block=True, **changes)
    network = on_meta_network(config, bf16).eval()
    noise = torch.empty(3, 2, 8, 8, device=META)
    wanted = torch.empty(3, dtype=torch.long, device=META)
    model = guided(
        lambda x, t, labels: network(x, t, labels).prediction,
        wanted,
        wanted,
        scale=2.0,
        channels=2,
        guided_channels=None,
        interval=None,
        keep_variance=False,
    )
    # Two steps of two passes each; heun takes two evaluations for a step.
    for method, passes in (("euler", 4), ("sde", 4), ("heun", 8)):
        with on_meta() as mode, torch.no_grad():
            sample_flow(model, noise, 2, method, draw=lambda: torch.empty_like(noise))
        assert mode.waits == passes * waits * len(network.moe_layers), method
