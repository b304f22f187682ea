"""The experts of one rank: stacked weights and one batched MLP."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffmoe.models.initialization import normal, xavier_uniform, zeros
from diffmoe.models.precision import autocast_dtype


class LowRank(NamedTuple):
    """Names of the factors (e, D, r) and (e, r, H) of a stack of matrices, and their scale."""

    a: str
    b: str
    scale: float


class Experts(nn.Module):
    """e MLPs with their weights stacked, so that all of them run in one batched product per layer.

    GELU (tanh form, with biases) as in DiT, or SwiGLU (three matrices, no biases).
    init_std: each expert's matrices start normally distributed; None: Xavier uniform.
    """

    matrices = ("w_in", "w_gate", "w_up", "w_out")
    biases = ("b_in", "b_out")

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        activation: str,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        matrix = xavier_uniform if init_std is None else normal(init_std)
        # Of one expert's part of each tensor.
        self.initializers = {
            **dict.fromkeys(self.matrices, matrix),
            **dict.fromkeys(self.biases, zeros),
        }
        if activation == "swiglu":
            self.w_gate = nn.Parameter(torch.empty(experts, width, hidden))
            self.w_up = nn.Parameter(torch.empty(experts, width, hidden))
        else:
            self.w_in = nn.Parameter(torch.empty(experts, width, hidden))
            self.b_in = nn.Parameter(torch.empty(experts, hidden))
            self.b_out = nn.Parameter(torch.empty(experts, width))
        self.w_out = nn.Parameter(torch.empty(experts, hidden, width))
        self.low_rank: dict[str, LowRank] = {}  # by matrix, of a LoRA run (lora.py)

    def forward(self, rows: Tensor, counts_e: Tensor | None) -> Tensor:
        """rows: (e, N, D) if every expert has N rows (counts_e None), else (N, D) by expert."""
        multiply = _batched_linear if counts_e is None else _GroupedLinear(rows, counts_e)

        def product(x: Tensor, name: str, b_eH: Tensor | None = None) -> Tensor:
            y = multiply(x, getattr(self, name), b_eH)
            if name not in self.low_rank:
                return y
            a, b, scale = self.low_rank[name]
            return y + multiply(scale * multiply(x, getattr(self, a)), getattr(self, b))

        if self.activation == "swiglu":
            hidden = F.silu(product(rows, "w_gate")) * product(rows, "w_up")
            return product(hidden, "w_out")
        hidden = F.gelu(product(rows, "w_in", self.b_in), approximate="tanh")
        return product(hidden, "w_out", self.b_out)


def _batched_linear(rows_eND: Tensor, w_eDH: Tensor, b_eH: Tensor | None = None) -> Tensor:
    if b_eH is None:
        return torch.bmm(rows_eND, w_eDH)
    return torch.baddbmm(b_eH[:, None], rows_eND, w_eDH)


# On a GPU as fast as a loop over the experts (docs/gpu.md), but the sizes stay in torch.
_FP32_DEVICES = ("cpu", "cuda") if torch.__version__ >= "2.11" else ("cpu",)


class _GroupedLinear:
    """Rows times their expert's matrix, for groups of unequal length."""

    def __init__(self, rows_ND: Tensor, counts_e: Tensor) -> None:
        self.counts_e = counts_e
        self.dtype = autocast_dtype(rows_ND) or rows_ND.dtype  # autocast ignores grouped_mm
        # torch's grouped product (2.10 on) takes these types only, and at least one row; elsewhere
        # one product per expert.
        self.has_kernel = (
            hasattr(F, "grouped_mm")
            and rows_ND.numel() > 0
            and (
                self.dtype == torch.bfloat16
                or (
                    self.dtype == torch.float32
                    and rows_ND.device.type in _FP32_DEVICES
                    and not torch.compiler.is_compiling()  # shape inference knows bf16 only
                )
            )
        )

    def __call__(self, rows_ND: Tensor, w_eDH: Tensor, b_eH: Tensor | None = None) -> Tensor:
        rows_ND, w_eDH = rows_ND.to(self.dtype), w_eDH.to(self.dtype)
        b_eH = None if b_eH is None else b_eH.to(self.dtype)
        # The kernel needs rows, in and out, whose length in bytes is a multiple of 16.
        if self.has_kernel and w_eDH.shape[1] % 8 == 0 and w_eDH.shape[2] % 8 == 0:
            ends_e = self.counts_e.cumsum(0).to(torch.int32)
            product_NH = F.grouped_mm(rows_ND, w_eDH, offs=ends_e)
            if product_NH.requires_grad:
                # Its backward refuses a broadcast gradient, such as that of a plain sum.
                product_NH.register_hook(torch.Tensor.contiguous)
            if b_eH is not None:
                product_NH = product_NH + b_eH.repeat_interleave(
                    self.counts_e, dim=0, output_size=len(rows_ND)
                )
            return product_NH
        groups = rows_ND.split(self.counts_e.tolist())
        products = [group @ w for group, w in zip(groups, w_eDH, strict=True)]
        if b_eH is not None:
            products = [product + b for product, b in zip(products, b_eH, strict=True)]
        return torch.cat(products)
