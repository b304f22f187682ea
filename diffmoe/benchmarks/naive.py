"""The MoE layer as it is first written down, to hold ours against: the same numbers, slowly."""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.models.families.diffmoe import DiffMoE


class NaiveMoE(DiffMoE):
    """One expert after another; all results in a buffer of E*S rows, gated and summed over E."""

    def _mix(
        self,
        tokens_SD: Tensor,
        token_index: Tensor,
        gates: Tensor,
        counts_E: Tensor | None,
        apart: Tensor | None = None,
    ) -> Tensor:
        # Unbound once, as if each expert were a module of its own.
        weights = zip(*(stacked.unbind() for stacked in self.experts.parameters()), strict=True)
        results = []
        for index_K, own in zip(token_index, weights, strict=True):
            rows_KD = self._expert(tokens_SD[index_K], *own)
            results.append(torch.zeros_like(tokens_SD).index_copy(0, index_K, rows_KD))
        gates_ES = tokens_SD.new_zeros(len(token_index), len(tokens_SD))
        gates_ES = gates_ES.scatter(1, token_index, gates.to(gates_ES.dtype))
        mixed_SD = (torch.stack(results) * gates_ES[:, :, None]).sum(dim=0)
        return mixed_SD if self.shared_expert is None else mixed_SD + self.shared_expert(tokens_SD)

    def _expert(self, rows_KD: Tensor, *weights: Tensor) -> Tensor:
        """weights: one expert's, in the order in which Experts declares them."""
        if self.experts.activation == "swiglu":
            w_gate, w_up, w_out = weights
            return (F.silu(rows_KD @ w_gate) * (rows_KD @ w_up)) @ w_out
        w_in, b_in, b_out, w_out = weights
        hidden_KH = F.gelu(torch.addmm(b_in, rows_KD, w_in), approximate="tanh")
        return torch.addmm(b_out, hidden_KH, w_out)
