"""The MoE feed-forward: route, dispatch, experts, combine, shared expert.

How tokens are selected is a family's part: one file each in `families/`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.models import routing
from diffmoe.models.blocks import dense_mlp, maybe_checkpoint
from diffmoe.models.experts import Experts
from diffmoe.models.initialization import normal
from diffmoe.models.precision import autocast_dtype
from diffmoe.models.routing import Assignment
from diffmoe.parallel.topology import Topology

# Endings of the buffers that are a family's state: tracked in training, stored with the weights.
ROUTING_STATE = (".thresholds", ".selection_bias")
# How many tokens are kept to compare experts by.
_PROBE = 32


class LayerRouting(NamedTuple):
    """Routing of one MoE layer in one forward pass, for losses, state and reports.

    selected_ES: which expert takes which token. capacity_logits_SE: what inference compares with
    thresholds: the capacity predictor's logits, or the router's (race). losses: scalars by name, in
    training; `MoEConfig.loss_weights` says how they count. seen_X: what the family's state follows,
    in training. target_prediction: of the objective's target, (B, C, H, W) (race). gate_sum: of a
    token, the mean over tokens, in training. probe_ND: some of the tokens, in training.
    """

    selected_ES: Tensor
    capacity_logits_SE: Tensor | None = None
    losses: dict[str, Tensor] = {}  # noqa: RUF012 (never changed)
    seen_X: Tensor | None = None
    target_prediction: Tensor | None = None
    gate_sum: Tensor | None = None
    probe_ND: Tensor | None = None


class Scored(NamedTuple):
    """The tokens of a forward pass, and what a family selects by.

    hidden_SD: what the router's last layer sees. logits_SE: of the router. ranked_SE: scores to
    choose by, without gradient. gates_SE: what experts' outputs are weighed by. null_B: samples
    without a condition; None: there are none.
    """

    tokens_SD: Tensor
    tokens_per_sample: int
    hidden_SD: Tensor
    logits_SE: Tensor
    ranked_SE: Tensor
    gates_SE: Tensor
    null_B: Tensor | None = None

    def of_samples(self, values_B: Tensor) -> Tensor:
        """Values of samples as those of their tokens, (S,)."""
        return values_B[:, None].expand(-1, self.tokens_per_sample).flatten()


class MoEFeedForward(nn.Module):
    """What all families share; a family says in `_select` which expert takes which token.

    routing_parts: names of the parameters and modules that decide it; a bf16 run keeps them in
    fp32, where steps far smaller than their values are not lost.
    """

    routing_parts: tuple[str, ...] = ("router", "router_time")

    def __init__(self, model: ModelConfig, moe: MoEConfig, topology: Topology) -> None:
        super().__init__()
        self.moe = moe
        self.checkpointing = False
        self.pool = topology.token_pool(moe.token_pool)
        self.dispatch = topology.dispatch()
        self.router = nn.Parameter(torch.empty(moe.experts, model.width))
        self.initializers = {"router": normal(moe.router_init_std)}
        self.router_time = None
        if moe.router_input == "plain_with_time":
            self.router_time = nn.Parameter(torch.empty(moe.experts, model.width))
            self.initializers["router_time"] = normal(moe.router_init_std)
        self.experts = Experts(
            moe.experts // topology.expert_parallel,
            model.width,
            int(model.width * moe.expert_ratio),
            moe.activation,
            moe.expert_init_std,
        )
        self.register_module("capacity_predictor", None)  # its place in the order of parameters
        self.shared_expert = (
            dense_mlp(
                model.width,
                int(model.width * moe.shared_expert_ratio),
                moe.shared_expert_activation,
            )
            if moe.shared_expert_ratio
            else None
        )

    def forward(
        self,
        x_BTD: Tensor,
        plain_BTD: Tensor | None = None,
        time_BD: Tensor | None = None,
        null_B: Tensor | None = None,
    ) -> tuple[Tensor, LayerRouting]:
        """What the experts add to each token, and what was routed where.

        x_BTD: modulated tokens, which the experts see. For other router inputs than those:
        plain_BTD, the same before their modulation; time_BD, an embedding of the timestep alone.
        null_B: which samples have no condition.
        """
        tokens_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
        assignment, layer_routing = self._route(
            tokens_SD, x_BTD.shape[1], plain_BTD, time_BD, null_B
        )
        # Routing is never computed again in the backward pass.
        mixed_SD = maybe_checkpoint(self.checkpointing, self._mix, tokens_SD, *assignment)
        return mixed_SD.view_as(x_BTD), layer_routing

    @classmethod
    def observed(
        cls, layers: Sequence["MoEFeedForward"], records: Sequence[LayerRouting]
    ) -> Tensor | None:
        """What a micro-batch shows to the layers' state, (L, X); None for a family without one.

        Their `move` gets its mean over micro-batches and ranks.
        """
        seen = [layer.seen_X for layer in records if layer.seen_X is not None]
        return torch.stack(seen) if seen else None

    def move(self, seen_X: Tensor) -> None:
        """One step of the layer's state, after an optimizer step."""
        raise NotImplementedError(f"{type(self).__name__} has no state")

    def _select(self, scored: Scored) -> tuple[Assignment, LayerRouting]:
        """A family's part: which expert takes which token, and what that adds to the loss."""
        raise NotImplementedError

    def _hidden(self, tokens_SD: Tensor) -> Tensor:
        """What the router's last layer sees; a family may have layers before it."""
        return tokens_SD

    def _logits(self, hidden_SD: Tensor) -> Tensor:
        """The router's last layer, (S, E)."""
        return routing.router_logits(hidden_SD, self.router)

    def _route(
        self,
        tokens_SD: Tensor,
        tokens_per_sample: int,
        plain_BTD: Tensor | None = None,
        time_BD: Tensor | None = None,
        null_B: Tensor | None = None,
    ) -> tuple[Assignment, LayerRouting]:
        probe_ND = tokens_SD.detach()[:_PROBE]
        # Once for all that routes: a bf16 run's router is fp32.
        tokens_SD = tokens_SD.to(self.router.dtype)
        if self.moe.router_input == "modulated":
            hidden_SD = self._hidden(tokens_SD)
        else:
            assert plain_BTD is not None
            hidden_SD = self._hidden(plain_BTD.flatten(0, 1))
        logits_SE = self._logits(hidden_SD)
        if self.router_time is not None:
            assert time_BD is not None
            time_BE = routing.router_logits(time_BD, self.router_time)
            logits_SE = logits_SE + time_BE.repeat_interleave(tokens_per_sample, dim=0)
        scores_SE = routing.router_scores(logits_SE, self.moe.gate)
        gates_SE = scores_SE if self.moe.gate_factor == 1 else scores_SE * self.moe.gate_factor
        ranked_SE = routing.ranked(scores_SE)
        assignment, layer_routing = self._select(
            Scored(tokens_SD, tokens_per_sample, hidden_SD, logits_SE, ranked_SE, gates_SE, null_B)
        )
        if not self.training:
            return assignment, layer_routing
        apart = 0 if assignment.apart is None else len(assignment.apart)  # whose gate is 1
        losses = dict(layer_routing.losses)
        if self.moe.z_loss_weight:
            losses["z"] = routing.z_loss(logits_SE)
        return assignment, layer_routing._replace(
            losses=losses,
            gate_sum=(assignment.gates.detach().abs().sum() + apart) / len(tokens_SD),
            probe_ND=probe_ND,
        )

    def _capacity(self, tokens: int, capacity: float) -> int:
        moe = self.moe
        return routing.expert_capacity(tokens, moe.experts, capacity, moe.capacity_rounding)

    def _assign(self, selected_ES: Tensor, gates_SE: Tensor, k: int) -> Assignment:
        """Static where every expert is known to take k tokens of every rank of the group."""
        equal_on_all_ranks = self.training or self.dispatch.size == 1
        if self.pool.ranks == 1 and equal_on_all_ranks:
            return routing.static_assignment(selected_ES, gates_SE, k)
        return routing.ragged_assignment(selected_ES, gates_SE)

    def _mix(
        self,
        tokens_SD: Tensor,
        token_index: Tensor,
        gates: Tensor,
        counts_E: Tensor | None,
        apart: Tensor | None = None,
    ) -> Tensor:
        """Gather each expert's tokens, run the experts, sum the gated results. -> (S, D)."""
        rows = routing.gather(tokens_SD, token_index)
        if counts_E is None:
            rows = self.dispatch.static(rows, self.experts)
        else:
            rows = self.dispatch.ragged(rows, counts_E, self.experts)
        base_SD = self._base(tokens_SD, apart)
        if autocast_dtype(tokens_SD) is not None:  # small terms would be rounded away in the sum
            base_SD, rows = base_SD.float(), rows.float()
        return routing.combine(base_SD, rows, gates, token_index).to(tokens_SD.dtype)

    def _base(self, tokens_SD: Tensor, apart: Tensor | None) -> Tensor:
        """What is added to every token, whatever was selected. apart: of `Assignment`."""
        if self.shared_expert is None:
            return torch.zeros_like(tokens_SD)
        return self.shared_expert(tokens_SD)


def routing_loss(routings: list[LayerRouting], moe: MoEConfig) -> Tensor | float:
    """What the MoE layers add to the loss: the sum over layers of each, times its weight."""
    names = routings[0].losses if routings else {}
    total: Tensor | float = 0.0
    for name in names:
        one = torch.stack([layer.losses[name] for layer in routings]).sum()
        if name == "capacity" and moe.capacity_loss_reduction == "mean":
            one = one / len(routings)
        weighted = moe.loss_weights[name] * one
        total = weighted if isinstance(total, float) else total + weighted
    return total
