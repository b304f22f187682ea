"""One feed-forward, forward and backward: ours, written naively, DeepSpeed's, and dense."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from diffmoe.benchmarks.ceiling import expert_products, products
from diffmoe.benchmarks.memory import Saved, peak_growth
from diffmoe.benchmarks.naive import NaiveMoE
from diffmoe.benchmarks.profiling import add_use
from diffmoe.benchmarks.report import Report
from diffmoe.benchmarks.routing_parts import ROUTING, parts_of, seeded_layer
from diffmoe.benchmarks.timing import Rounds, forward_backward, take_turns
from diffmoe.config import Config
from diffmoe.models.blocks import MLP
from diffmoe.models.families.diffmoe import DiffMoE
from diffmoe.models.precision import DTYPES
from diffmoe.models.routing import expert_capacity
from diffmoe.parallel.topology import Topology
from diffmoe.planning.layouts import Layout
from diffmoe.planning.products import Products, mixture_products, routing_products


class Candidate(NamedTuple):
    """function maps tokens (1, S, D) to the layer's output, and to a loss of its own if it has."""

    module: nn.Module
    function: Callable[[Tensor], Tensor | tuple[Tensor, ...]]


def layer_flops(layout: Layout) -> int:
    """Of one MoE layer, forward and backward, with a gradient of its tokens."""
    parameters = layout.sizes.parameters
    found, router = Products(parameters), ".router"
    name = next(one.removesuffix(router) for one in parameters if one.endswith(router))
    routing_products(found, layout, name, tokens=True, plain=True, time=True)
    mixture_products(found, layout, name, tokens=True)
    return found.forward + found.backward


def mixture_of(
    config: Config,
    kind: type[DiffMoE],
    device: torch.device,
    topology: Topology = Topology(),  # noqa: B008 (frozen)
) -> Candidate:
    """Our layer, or its naive form; the same weights under the same configuration."""
    layer = kind(config.model, config.moe, topology)
    layer = seeded_layer(layer, device, DTYPES[config.training.precision])

    def function(tokens: Tensor) -> tuple[Tensor, ...]:
        mixed, layer_routing = layer(tokens)
        return mixed, layer_routing.losses["capacity"]

    return Candidate(layer, function)


def dense_of(config: Config, device: torch.device) -> Candidate:
    """An MLP with the hidden units that a token of capacity C meets."""
    moe, width = config.moe, config.model.width
    hidden = int(width * (moe.expert_ratio * moe.capacity + moe.shared_expert_ratio))
    mlp = MLP(width, hidden).to(device, DTYPES[config.training.precision])
    return Candidate(mlp, mlp)


def deepspeed_of(config: Config, device: torch.device) -> Candidate:
    """DeepSpeed's MoE layer, top-1, as many slots as our experts take tokens. Needs a process
    group: its experts lie in groups of their own even on one rank.
    """
    moe, width = config.moe, config.model.width
    expert = MLP(width, int(width * moe.expert_ratio))
    layer = MoE(
        width, expert, moe.experts, k=1, capacity_factor=moe.capacity, min_capacity=1, use_rts=False
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it tells that it makes a group
        layer.set_deepspeed_parallelism()
    layer = layer.to(device, DTYPES[config.training.precision])

    def function(tokens: Tensor) -> tuple[Tensor, ...]:
        mixed, balance, _ = layer(tokens)
        return mixed, balance

    return Candidate(layer, function)


def candidates(config: Config, device: torch.device) -> dict[str, Candidate]:
    return {
        "ours": mixture_of(config, DiffMoE, device),
        "naive": mixture_of(config, NaiveMoE, device),
        "DeepSpeed": deepspeed_of(config, device),
        "dense": dense_of(config, device),
    }


def random_tokens(config: Config, device: torch.device) -> Tensor:
    """(1, S, D), with a gradient: the tokens of a batch, in one row."""
    tokens = config.training.batch_size * Layout(config, 1, 1).tokens_per_sample
    x = torch.randn(1, tokens, config.model.width, generator=torch.Generator().manual_seed(0))
    return x.to(device, DTYPES[config.training.precision]).requires_grad_()


def work_of(candidate: Candidate, tokens: Tensor) -> Callable[[], object]:
    """Forward and backward, with the gradients of the tokens and of every parameter."""
    parameters = [one for one in candidate.module.parameters() if one.requires_grad]
    return forward_backward(lambda x, *_: candidate.function(x), tokens, *parameters)


def saved_bytes(candidate: Candidate, tokens: Tensor) -> int:
    """What one forward keeps for its backward, parameters and the tokens themselves excepted."""
    with Saved([*candidate.module.parameters(), tokens]) as saved:
        result = candidate.function(tokens)
    del result
    return saved.bytes


def shape_of(config: Config) -> str:
    """As the figures' names begin."""
    return f"E{config.moe.experts} ratio {config.moe.expert_ratio:g}"


def benchmark_layer(
    config: Config, rounds: int, device: torch.device, report: Report, trace: Path | None = None
) -> None:
    """Figures of one shape of the layer. trace: gets one forward and backward of ours."""
    name = shape_of(config)
    layout = Layout(config, 1, 1)
    tokens = random_tokens(config, device)
    compared = candidates(config, device)
    hidden = int(config.model.width * config.moe.expert_ratio)
    dtype = DTYPES[config.training.precision]
    gemm, gemm_flops = products(layout.tokens, config.model.width, hidden, dtype, device)
    works = {one: work_of(candidate, tokens) for one, candidate in compared.items()}
    ours = compared["ours"].module
    assert isinstance(ours, DiffMoE)
    parts = parts_of(ours, tokens.detach()[0].requires_grad_())
    moe = config.moe
    k = expert_capacity(layout.tokens, moe.experts, moe.capacity, moe.capacity_rounding)
    bare = expert_products(config.moe.experts, k, config.model.width, hidden, dtype, device)
    timed = take_turns({"GEMM": gemm, "products": bare, **works, **parts}, rounds, device)

    rate = gemm_flops / timed.median("GEMM")
    report.add(f"{name}: GEMM ceiling", rate / 1e9, "GFLOP/s")
    for one in works:
        ratio = None if one == "ours" else timed.ratio("ours", one)
        label = f"{name}: ours" if one == "ours" else f"{name}: {one} (ratio: ours to it)"
        report.add(label, timed.median(one) * 1e3, "ms", ratio)
    utilization = layer_flops(layout) / gemm_flops * timed.ratio("GEMM", "ours")
    report.add(f"{name}: ours, share of the ceiling", utilization, "")
    report.add(f"{name}: ours, tokens", layout.tokens / timed.median("ours"), "tokens/s")
    bound = timed.median("products")
    ratio = timed.ratio("ours", "products")
    report.add(f"{name}: its experts' bare products (ratio: ours to it)", bound * 1e3, "ms", ratio)
    _add_parts(report, name, timed, parts)
    for one, candidate in compared.items():
        saved = saved_bytes(candidate, tokens)
        report.add(f"{name}: {one}, saved for backward", saved / 2**20, "MiB")
        peak = peak_growth(works[one], device)
        if peak is not None:
            report.add(f"{name}: {one}, peak growth, gradients too", peak / 2**20, "MiB")
        add_use(report, f"{name}: {one}", works[one], device, trace if one == "ours" else None)


def _add_parts(
    report: Report, name: str, timed: Rounds, parts: dict[str, Callable[[], object]]
) -> None:
    for part in parts:
        ratio = timed.ratio(part, "ours")
        report.add(f"{name}: {part} (ratio: to the layer)", timed.median(part) * 1e3, "ms", ratio)
    share = sum(timed.ratio(part, "ours") for part in ROUTING)
    report.add(f"{name}: routing, share of the layer", share, "", at_most=0.12)
