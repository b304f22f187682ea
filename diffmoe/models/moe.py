"""The MoE feed-forward: route, dispatch, experts, combine, shared expert."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.models import routing
from diffmoe.models.blocks import dense_mlp, maybe_checkpoint
from diffmoe.models.capacity_predictor import CapacityPredictor, capacity_loss
from diffmoe.models.experts import Experts
from diffmoe.models.initialization import normal
from diffmoe.models.precision import autocast_dtype
from diffmoe.models.routing import Assignment
from diffmoe.parallel.topology import Topology


class LayerRouting(NamedTuple):
    """Routing of one MoE layer in one forward pass, for losses, thresholds and reports.

    selected_ES: which expert takes which token. capacity_logits_SE: of the capacity predictor.
    capacity_loss, balance_loss: scalars, in training.
    """

    selected_ES: Tensor
    capacity_logits_SE: Tensor | None = None
    capacity_loss: Tensor | None = None
    balance_loss: Tensor | None = None


class MoEFeedForward(nn.Module):
    """Experts that choose their tokens (arXiv 2503.14487, section 3), or a baseline's routing.

    In training the experts take the best tokens of the pool; in evaluation `inference` decides:
    per_token (Eq. 14; an image does not depend on its batch mates), pooled (Alg. 4) or static.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig, topology: Topology) -> None:
        super().__init__()
        self.moe = moe
        self.inference, self.capacity = moe.inference, moe.capacity
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
        self.capacity_predictor = (
            CapacityPredictor(model.width, moe.experts) if moe.type == "diffmoe" else None
        )
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
        self, x_BTD: Tensor, plain_BTD: Tensor | None = None, time_BD: Tensor | None = None
    ) -> tuple[Tensor, LayerRouting]:
        """What the experts add to each token, and what was routed where.

        x_BTD: modulated tokens, which the experts see. For other router inputs than those:
        plain_BTD, the same before their modulation; time_BD, an embedding of the timestep alone.
        """
        tokens_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
        assignment, layer_routing = self._route(tokens_SD, x_BTD.shape[1], plain_BTD, time_BD)
        # Routing is never computed again in the backward pass.
        mixed_SD = maybe_checkpoint(self.checkpointing, self._mix, tokens_SD, *assignment)
        return mixed_SD.view_as(x_BTD), layer_routing

    def _router_logits(
        self, tokens_SD: Tensor, plain_BTD: Tensor | None, time_BD: Tensor | None
    ) -> Tensor:
        """moe.router_input: what the router sees."""
        if self.moe.router_input == "modulated":
            return routing.router_logits(tokens_SD, self.router)
        assert plain_BTD is not None
        logits_BTE = routing.router_logits(plain_BTD, self.router)
        if self.router_time is not None:
            assert time_BD is not None
            logits_BTE = logits_BTE + routing.router_logits(time_BD, self.router_time)[:, None]
        return logits_BTE.flatten(0, 1)

    def _route(
        self,
        tokens_SD: Tensor,
        tokens_per_sample: int,
        plain_BTD: Tensor | None = None,
        time_BD: Tensor | None = None,
    ) -> tuple[Assignment, LayerRouting]:
        tokens = tokens_SD.shape[0]  # not len(), which torch.export takes for a constant
        router_SE = self._router_logits(tokens_SD, plain_BTD, time_BD)
        scores_SE = routing.router_scores(router_SE, self.moe.gate)
        ranked_SE = routing.ranked(scores_SE)
        gates_SE = scores_SE if self.moe.gate_factor == 1 else scores_SE * self.moe.gate_factor
        if self.moe.type == "token_choice":
            selected_ES = routing.token_choice_mask(ranked_SE, self.moe.top_k)
            balance = None
            if self.training:
                balance = routing.load_balancing_loss(router_SE.softmax(dim=-1), selected_ES)
            assignment = routing.ragged_assignment(selected_ES, gates_SE)
            return assignment, LayerRouting(selected_ES, balance_loss=balance)
        if self.moe.type == "expert_choice":
            k = self._capacity(tokens_per_sample, self.moe.capacity)
            selected_ES = routing.expert_choice_mask(ranked_SE, tokens_per_sample, k)
            k *= tokens // tokens_per_sample
            return self._assign(selected_ES, gates_SE, k), LayerRouting(selected_ES)
        assert self.capacity_predictor is not None
        logits_SE = self.capacity_predictor(tokens_SD)
        if self.training:
            k = self._capacity(tokens * self.pool.ranks, self.moe.capacity)
            selected_ES = self._select_from_pool(ranked_SE, k)
            loss = capacity_loss(logits_SE, selected_ES)
            return (
                self._assign(selected_ES, gates_SE, k),
                LayerRouting(selected_ES, logits_SE, loss),
            )
        if self.inference == "static":
            k = self._capacity(tokens, self.capacity)
            selected_ES = routing.top_k_mask(ranked_SE.t(), k)
            return self._assign(selected_ES, gates_SE, k), LayerRouting(selected_ES, logits_SE)
        wanted_SE = self.capacity_predictor.wanted(logits_SE)
        if self.inference == "pooled":
            selected_ES = routing.counted_mask(ranked_SE, wanted_SE.sum(dim=0))
        else:
            selected_ES = wanted_SE.t()
        return routing.ragged_assignment(selected_ES, gates_SE), LayerRouting(
            selected_ES, logits_SE
        )

    def _capacity(self, tokens: int, capacity: float) -> int:
        moe = self.moe
        return routing.expert_capacity(tokens, moe.experts, capacity, moe.capacity_rounding)

    def _select_from_pool(self, scores_SE: Tensor, k: int) -> Tensor:
        scores_ES = scores_SE.t().contiguous()
        kth_E = self.pool.kth_largest(scores_ES, k)
        return routing.select_largest(scores_ES, kth_E, self.pool.ties(scores_ES, kth_E, k))

    def _assign(self, selected_ES: Tensor, gates_SE: Tensor, k: int) -> Assignment:
        """Static where every expert is known to take k tokens of every rank of the group."""
        equal_on_all_ranks = self.training or self.dispatch.size == 1
        if self.pool.ranks == 1 and equal_on_all_ranks:
            return routing.static_assignment(selected_ES, gates_SE, k)
        return routing.ragged_assignment(selected_ES, gates_SE)

    def _mix(
        self, tokens_SD: Tensor, token_index: Tensor, gates: Tensor, counts_E: Tensor | None
    ) -> Tensor:
        """Gather each expert's tokens, run the experts, sum the gated results. -> (S, D)."""
        rows = routing.gather(tokens_SD, token_index)
        if counts_E is None:
            rows = self.dispatch.static(rows, self.experts)
        else:
            rows = self.dispatch.ragged(rows, counts_E, self.experts)
        base_SD = (
            torch.zeros_like(tokens_SD)
            if self.shared_expert is None
            else self.shared_expert(tokens_SD)
        )
        if autocast_dtype(tokens_SD) is not None:  # small terms would be rounded away in the sum
            base_SD, rows = base_SD.float(), rows.float()
        return routing.combine(base_SD, rows, gates, token_index).to(tokens_SD.dtype)


def routing_loss(routings: list[LayerRouting], moe: MoEConfig) -> Tensor | float:
    """What the MoE layers add to the loss: capacity prediction (Eq. 13) or load balancing."""
    if moe.type == "diffmoe":
        losses = [layer.capacity_loss for layer in routings if layer.capacity_loss is not None]
        total = torch.stack(losses).sum()
        if moe.capacity_loss_reduction == "mean":
            total = total / len(routings)
        return moe.capacity_loss_weight * total
    if moe.type == "token_choice":
        losses = [layer.balance_loss for layer in routings if layer.balance_loss is not None]
        return moe.aux_loss_weight * torch.stack(losses).sum()
    return 0.0
