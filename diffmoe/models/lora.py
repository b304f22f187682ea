"""LoRA (arXiv 2106.09685): factors of low rank beside weights that stay as they are.

A weight W counts as W + s B A, with s = lora.scale; B starts at zero. The factors of NAME are the
parameters NAME_lora_a and NAME_lora_b of the same module, whose forward adds what they do to its
input. So everything of the base keeps its name, type and value, and all that goes by names (frozen
parts, experts' ranks, ZeRO, averages, checkpoints) needs no other rule. torch's parametrize and
wrapped modules rename the base; a parametrized weight is moreover made anew in every forward, with
a whole gradient: the memory that LoRA is there to save.
"""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffmoe.config import LoRAConfig
from diffmoe.errors import UserError
from diffmoe.models.blocks import MLP, Attention, CrossAttention, SwiGLU
from diffmoe.models.experts import Experts, LowRank
from diffmoe.models.initialization import normal, starting, zeros
from diffmoe.models.matrices import hidden_matrices

_GROUPS: dict[str, tuple[type[nn.Module], ...]] = {
    "attention": (Attention, CrossAttention),
    "mlp": (MLP, SwiGLU),
    "experts": (Experts,),
}
_ENDINGS = ("_lora_a", "_lora_b")


def factor_names(weight: str) -> tuple[str, str]:
    """Of A and B, by the name of their weight."""
    a, b = (weight + ending for ending in _ENDINGS)
    return a, b


def is_factor(name: str) -> bool:
    """Whether a parameter of a network is a factor, not of its base."""
    return name.endswith(_ENDINGS)


def weight_of(name: str) -> str:
    """The name of a factor's weight; any other parameter's own."""
    return name[: -len(_ENDINGS[0])] if is_factor(name) else name


def add_factors(network: nn.Module, lora: LoRAConfig) -> None:
    """Give the targeted weights their factors, still to be initialized. Raises UserError as
    `targeted`.

    Of a linear layer (out, in): A (r, in), B (out, r). Of stacked experts, whose inputs come first,
    (e, in, out): A (e, in, r), B (e, r, out).
    """
    for name in targeted(network, lora.targets):
        path, _, last = name.rpartition(".")
        module = network.get_submodule(path)
        weight, (a, b) = module.get_parameter(last), factor_names(last)
        sizes: tuple[tuple[int, ...], tuple[int, ...]]
        if isinstance(module, Experts):
            experts, inputs, outputs = weight.shape
            sizes = (experts, inputs, lora.rank), (experts, lora.rank, outputs)
            module.low_rank[last] = LowRank(a, b, lora.scale)
        else:
            outputs, inputs = weight.shape
            sizes = (lora.rank, inputs), (outputs, lora.rank)
            module.register_forward_hook(partial(_add_product, lora.scale))
        for factor, size in zip((a, b), sizes, strict=True):
            module.register_parameter(factor, nn.Parameter(weight.new_empty(size)))
        starts = {**getattr(module, "initializers", {}), a: normal(inputs**-0.5), b: zeros}
        starting(module, **starts)


def _add_product(scale: float, linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    (x,), (a, b) = inputs, (linear.get_parameter(name) for name in factor_names("weight"))
    return output + F.linear(scale * F.linear(x, a), b)


def targeted(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the weights that groups and patterns name, in the network's order.

    Raises UserError for one that names nothing, with what is near it.
    """
    names = list(hidden_matrices(network))
    groups: dict[str, list[str]] = {group: [] for group in _GROUPS}
    for prefix, module in network.named_modules():
        for group, kinds in _GROUPS.items():
            if isinstance(module, kinds):
                groups[group] += [name for name in names if name.startswith(f"{prefix}.")]
    found: set[str] = set()
    for target in targets:
        matching = groups.get(target) or [name for name in names if fnmatchcase(name, target)]
        if not matching:
            there = [group for group, members in groups.items() if members]
            near = difflib.get_close_matches(target, [*there, *names], 1, cutoff=0.0)[0]
            raise UserError(
                f"lora.targets: {target} names no weight of attention, MLPs or experts; did you "
                f"mean {near}? Groups of this network are {', '.join(there)}, and tools/plan.py "
                "--parameters lists names"
            )
        found.update(matching)
    return [name for name in names if name in found]


def merged_state(network: nn.Module, scale: float) -> dict[str, Tensor]:
    """The state dict of the base with the factors merged into their weights, and without them."""
    state = network.state_dict()
    for name in [name for name in state if factor_names(name)[0] in state]:
        a, b = (state.pop(factor) for factor in factor_names(name))
        state[name] = merged(state[name], a, b, scale)
    return state


@torch.no_grad()
def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What the weight counts as with its factors; of experts, too."""
    product = a @ b if weight.dim() == 3 else b @ a
    return weight + scale * product
