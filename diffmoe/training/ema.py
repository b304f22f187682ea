"""An exponential moving average of the weights, in fp32 over the ranges that this rank owns."""

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from diffmoe.parallel.zero import OwnedRange


class EMA:
    """No second full copy: one tensor beside each of the rank's flat fp32 partitions.

    Buffers are not averaged; a checkpoint stores them as they are.
    """

    def __init__(self, engine: DeepSpeedEngine, decay: float) -> None:
        self.decay = decay
        self.masters: list[Tensor] = list(engine.optimizer.single_partition_of_fp32_groups)
        self.averages = [master.detach().clone() for master in self.masters]

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step: average = decay * average + (1 - decay) * weights."""
        for average, master in zip(self.averages, self.masters, strict=True):
            average.lerp_(master, 1 - self.decay)

    def piece(self, owned: OwnedRange) -> Tensor:
        """The average of an owned range, a view."""
        index = next(i for i, master in enumerate(self.masters) if master is owned.partition)
        return self.averages[index].narrow(0, owned.offset, len(owned.master))
