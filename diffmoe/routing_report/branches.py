"""How large the feed-forwards' outputs are, and how alike the experts': by watching the modules."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from diffmoe.capacity import health
from diffmoe.models.dit import DiT
from diffmoe.models.moe import MoEFeedForward

# Tokens of each layer by which its experts are compared.
_TOKENS = 256


class Branches:
    """What the feed-forwards of a network added while it was watched."""

    def __init__(self, network: DiT) -> None:
        self.network = network
        self._squares: dict[nn.Module, Tensor] = {}
        self._calls: dict[nn.Module, int] = {}
        self._tokens: dict[nn.Module, Tensor] = {}

    def see(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A forward hook of a feed-forward."""
        mixed_BTD = output[0] if isinstance(module, MoEFeedForward) else output
        square = mixed_BTD.detach().double().square().mean()
        self._squares[module] = self._squares.get(module, 0) + square
        self._calls[module] = self._calls.get(module, 0) + 1
        self._tokens.setdefault(module, inputs[0].detach().flatten(0, 1)[:_TOKENS])

    def size(self, module: nn.Module) -> float:
        """Root mean square of what it added to a token."""
        return float((self._squares[module] / self._calls[module]).sqrt())

    def health(self) -> dict[str, list[float]]:
        """By MoE layer: size, size over that of the dense blocks, and how alike experts are."""
        layers = self.network.moe_layers
        dense = [
            self.size(module)
            for module in self.network.feed_forwards
            if not isinstance(module, MoEFeedForward)
        ]
        sizes = [self.size(layer) for layer in layers]
        found = {"branch_size": sizes}
        if dense:
            found["branch_size_over_dense"] = [size / (sum(dense) / len(dense)) for size in sizes]
        if len(layers[0].experts.w_out) > 1:
            found["expert_weight_similarity"] = [
                float(health.weight_similarity(layer.experts)) for layer in layers
            ]
            found["expert_output_similarity"] = [
                float(health.output_similarity(layer.experts, self._tokens[layer]))
                for layer in layers
            ]
        return found


@contextmanager
def watching(network: DiT) -> Iterator[Branches]:
    """Look at every feed-forward while in the `with` block."""
    branches = Branches(network)
    hooks = [module.register_forward_hook(branches.see) for module in network.feed_forwards]
    try:
        yield branches
    finally:
        for hook in hooks:
            hook.remove()
