"""ProMoE (arXiv 2510.24711): tokens take the expert of the nearest prototype."""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.models import routing
from diffmoe.models.blocks import dense_mlp
from diffmoe.models.moe import LayerRouting, MoEFeedForward, Scored
from diffmoe.models.precision import outside_autocast
from diffmoe.models.routing import Assignment
from diffmoe.parallel.topology import Topology


class ProMoE(MoEFeedForward):
    """Logits are cosines to prototypes (the rows of `router`); tokens take their moe.top_k best.

    Tokens of samples without a condition all go to an expert of their own, with a gate of 1: not
    one of the stacked experts, whose number can then be shared among ranks.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig, topology: Topology) -> None:
        super().__init__(model, moe, topology)
        hidden = int(model.width * moe.expert_ratio)
        self.unconditional_expert = dense_mlp(model.width, hidden, moe.activation)

    def _logits(self, hidden_SD: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_SD.dtype, torch.float32)
        with outside_autocast(hidden_SD):
            directions_SD = F.normalize(hidden_SD.to(dtype), dim=-1)
            return F.linear(directions_SD, F.normalize(self.router.to(dtype), dim=-1))

    def _select(self, scored: Scored) -> tuple[Assignment, LayerRouting]:
        selected_ES = routing.token_choice_mask(scored.ranked_SE, self.moe.top_k)
        null_n = None
        if scored.null_B is not None:
            null_S = scored.of_samples(scored.null_B)
            selected_ES = selected_ES & ~null_S
            (null_n,) = null_S.nonzero(as_tuple=True)
        losses = {}
        if self.training and self.moe.contrastive_loss_weight:
            losses["contrastive"] = contrastive_loss(
                scored.tokens_SD, self.router, selected_ES, self.moe.contrastive_temperature
            )
        assignment = routing.ragged_assignment(selected_ES, scored.gates_SE)
        return assignment._replace(apart=null_n), LayerRouting(selected_ES, losses=losses)

    def _base(self, tokens_SD: Tensor, apart: Tensor | None) -> Tensor:
        base_SD = super()._base(tokens_SD, apart)
        if apart is None:
            apart = torch.zeros(0, dtype=torch.long, device=tokens_SD.device)
        # Without such tokens it works on none, so its gradient is zero, not missing.
        rows_nD = self.unconditional_expert(routing.gather(tokens_SD, apart))
        return base_SD.index_add(0, apart, rows_nD.to(base_SD.dtype))


def contrastive_loss(
    tokens_SD: Tensor, prototypes_ED: Tensor, selected_ES: Tensor, temperature: float
) -> Tensor:
    """The routing contrastive loss: prototypes near the mean of their own tokens, far from others'.

    Cross-entropy of cosines over temperature among the experts that have tokens, its mean; 0 if
    fewer than two have. Of this rank's micro-batch; its gradient reaches tokens and prototypes.
    """
    dtype = torch.promote_types(tokens_SD.dtype, torch.float32)
    with outside_autocast(tokens_SD):
        taken_ES = selected_ES.to(dtype)
        counts_E = taken_ES.sum(dim=1)
        means_ED = taken_ES @ tokens_SD.to(dtype) / counts_E.clamp(min=1)[:, None]
        prototypes_ED = F.normalize(prototypes_ED.to(dtype), dim=-1)
        cosines_EE = prototypes_ED @ F.normalize(means_ED, dim=-1).t() / temperature
        active_E = counts_E > 0
        cosines_EE = cosines_EE.masked_fill(~active_E, -1e9)  # not -inf: all may be idle
        losses_E = cosines_EE.logsumexp(dim=1) - cosines_EE.diagonal()
        return torch.where(active_E, losses_E, 0.0).sum() / active_E.sum().clamp(min=1)
