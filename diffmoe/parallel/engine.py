"""DeepSpeed's engine, where it decides otherwise than a run needs."""

from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from torch import Tensor

from diffmoe.parallel.frozen import Frozen


class Engine(deepspeed.DeepSpeedEngine):
    """The engine with bf16 beside fp32 parameters, and a short way from gradients to a step.

    frozen: the parameters that it does not know.
    """

    frozen: Frozen

    def spread_masters(self) -> None:
        """Fill the network from the fp32 masters of all ranks. Every rank calls it."""
        self.optimizer.update_lp_params()
        self.frozen.spread()

    def _configure_with_arguments(self, args: Any, mpu: Any) -> None:
        super()._configure_with_arguments(args, mpu)
        if get_accelerator().device_name() == "cuda":
            # It would take the GPU of the local rank's number, but ranks may share one.
            self.local_rank = torch.cuda.current_device()

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        # For bf16 beside fp32 gradients at stage 1 it would take its BF16_Optimizer, whose masters
        # lie otherwise; the ZeRO optimizer does it as well.
        super()._do_optimizer_sanity_check(basic_optimizer)
        return ZERO_OPTIMIZATION

    def _cast_module_mixed_precision(self, *_: Any, **__: Any) -> None:
        pass  # it would cast every parameter to bf16

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        zero = super()._configure_zero_optimizer(optimizer)
        if not zero.cpu_offload:
            # It would look at each gradient a dozen times, more launches than a backward pass has.
            # Their norm tells as well whether all are finite.
            zero.check_overflow = lambda partition_gradients=True: None
            zero.get_grad_norm_direct = partial(gradient_norm, zero)
        return zero

    def _take_model_step(self, *arguments: Any, **options: Any) -> None:
        super()._take_model_step(*arguments, **options)
        if self.optimizer.overflow:
            # With offload it would add the next step's gradients to the sums of a skipped one.
            sums = self.optimizer.averaged_gradients
            sums.update(dict.fromkeys(sums))


def gradient_norm(zero: Any, gradients: list[Tensor], *_: Any, **__: Any) -> Tensor:
    """What ZeRO's `get_grad_norm_direct` computes, in a few launches for all gradients of a group.

    Their L2 norm over all ranks, summed in fp64; -1 where it is not finite, as ZeRO wants it.
    """
    own = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    total = torch.zeros((), device=zero.device)
    if own:
        total = torch.stack(torch._foreach_norm(own, 2, torch.float64)).pow(2).sum().float()
    deepspeed.comm.all_reduce(total, group=zero.dp_process_group)
    norm = total.sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)
