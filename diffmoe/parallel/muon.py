"""Muon for the matrices of blocks, AdamW for all else, on the flat partitions of ZeRO 1 and 2."""

from typing import Any

import torch
from torch import Tensor

from diffmoe.config import MuonConfig
from diffmoe.parallel.matrix_layout import MatrixLayout
from diffmoe.parallel.orthogonalize import Matrices, orthogonalize


class Muon(torch.optim.AdamW):
    """Parameter groups with `matrices` are updated by Muon, the others by AdamW.

    M <- m M + (1 - m) G;  W <- (1 - lr wd) W - lr s NS(m M + (1 - m) G),

    as torch.optim.Muon with Nesterov momentum; NS is `orthogonalize` and s `Matrices.factor`. G is
    the whole batch's gradient, clipped. Momentum is fp32 and, like AdamW's moments, of the rank's
    partition; a matrix that a partition's end cuts is orthogonalized whole by the rank where it
    begins. DeepSpeed's own Muon clips updates instead of gradients, keeps the momentum in bf16 in
    bf16 runs, and whole matrices of it on each rank that has a part; so this is not built on it.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        muon: MuonConfig,
        dtype: torch.dtype,
        **adamw: Any,
    ) -> None:
        """groups: of `create_engine`. dtype: of Newton-Schulz's products. adamw: of torch.optim."""
        super().__init__(groups, **adamw)
        self.muon, self.dtype = muon, dtype
        self.layouts: dict[Tensor, MatrixLayout] = {}

    def attach(self, zero: Any) -> None:
        """Learn how DeepSpeed's optimizer has laid the matrices out in its partitions."""
        for index, group in enumerate(self.param_groups):
            if "matrices" in group:
                layout = MatrixLayout.of(zero, index, group["matrices"])
                self.layouts[group["params"][0]] = layout

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """DeepSpeed calls it with one group at a time, on every rank."""
        groups = self.param_groups
        for group in groups:
            if "matrices" in group:
                self._muon_step(group)
        self.param_groups = [group for group in groups if "matrices" not in group]
        loss = super().step(closure)
        self.param_groups = groups
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        (master,) = group["params"]
        layout, state, rate = self.layouts[master], self.state[master], group["lr"]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(master)
        momentum = state["momentum"].lerp_(master.grad, 1 - self.muon.momentum)
        update = master.grad.lerp_(momentum, self.muon.momentum)
        master.mul_(1 - rate * group["weight_decay"])
        for start, stack in layout.whole:
            part = slice(start, start + stack.number * stack.size)
            found = self._orthogonal(update[part].to(layout.device), stack)
            master[part].sub_(found.to(master), alpha=rate)
        if layout.cut is not None:
            cut = layout.cut
            flat = cut.gather(update, layout.group, layout.device)
            if cut.owned is not None:
                flat = self._orthogonal(flat, cut.owned)
            head, tail = cut.scatter(flat, layout.group)
            master[: cut.head].sub_(head.to(master), alpha=rate)
            master[len(master) - cut.tail :].sub_(tail.to(master), alpha=rate)

    def _orthogonal(self, flat: Tensor, stack: Matrices) -> Tensor:
        """The updates of a stack, without the rate, as fp32 elements like those given."""
        matrices_NRC = flat.view(-1, stack.rows, stack.columns)
        muon = self.muon
        found_NRC = orthogonalize(matrices_NRC, muon.steps, muon.newton_schulz, self.dtype)
        return found_NRC.float().mul_(stack.factor(muon.scale)).flatten()
