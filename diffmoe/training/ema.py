"""Moving averages of the weights, in fp32 over the ranges that this rank owns."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from diffmoe.checkpoints.profiles import constant_keep, power_keep, power_prefix
from diffmoe.parallel.zero import OwnedRange


class EMA:
    """No second full copy: per average, one tensor beside each of the rank's flat fp32 partitions.

    Buffers are not averaged; a checkpoint stores them as they are. Without a decay and lengths it
    holds nothing and does nothing.
    """

    def __init__(
        self, engine: DeepSpeedEngine, decay: float | None, stds: Sequence[float] = ()
    ) -> None:
        """decay: of the constant-decay average. stds: relative lengths of power-function ones."""
        self.masters: list[Tensor] = list(engine.optimizer.single_partition_of_fp32_groups)
        self._keep: dict[str, Callable[[int], float]] = {
            power_prefix(std): partial(power_keep, std) for std in stds
        }
        if decay is not None:
            self._keep["ema"] = partial(constant_keep, decay)
        self.averages: dict[str, list[Tensor]] = {
            prefix: [master.detach().clone() for master in self.masters] for prefix in self._keep
        }

    @property
    def sampled(self) -> str:
        """The prefix of the weights to sample from and to measure: "ema" if there is that average.

        Else the last of `averages`; "live", the weights themselves, where nothing is averaged.
        """
        return next(iter(reversed(self.averages)), "live")

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step`, from 1, skipped ones not counted."""
        for prefix, averages in self.averages.items():
            new = 1 - self._keep[prefix](step)
            for average, master in zip(averages, self.masters, strict=True):
                average.lerp_(master, new)

    @contextmanager
    def in_place_of_weights(self, engine: DeepSpeedEngine, prefix: str) -> Iterator[None]:
        """Inside, the network computes with an average; nothing is copied, and no bit changes.

        prefix: of `averages`; one that is not there changes nothing. Every rank enters and leaves;
        an error inside ends the run, so nothing is put back then.
        """

        def swap() -> None:
            averages = self.averages.get(prefix, self.masters)
            for master, average in zip(self.masters, averages, strict=True):
                master.data, average.data = average.data, master.data
            engine.optimizer.update_lp_params()

        swap()
        yield
        swap()

    def pieces(self, owned: OwnedRange) -> dict[str, Tensor]:
        """Each average of an owned range, a view, by its prefix in a checkpoint.

        Those of a frozen parameter are the parameter itself.
        """
        if owned.partition is None:
            return dict.fromkeys(self.averages, owned.master)
        index = next(i for i, master in enumerate(self.masters) if master is owned.partition)
        return {
            prefix: averages[index].narrow(0, owned.offset, len(owned.master))
            for prefix, averages in self.averages.items()
        }
