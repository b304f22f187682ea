"""How much a model computes: capacity by time, layer and expert, and activated parameters."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.capacity.forward import Forward
from diffmoe.models.dit import DiT


class CapacityByTime(NamedTuple):
    """Capacity C (Eq. 8) at every time of sampling, fp64 on the CPU.

    times: (n,) rising, 0 is noise and 1 data. capacity: (n, L, E): E times the share of tokens that
    the layer's expert took. tokens: (n,) of how many tokens.
    """

    times: Tensor
    capacity: Tensor
    tokens: Tensor

    @property
    def by_time(self) -> Tensor:
        """C of the whole forward pass (Eq. 9), (n,)."""
        return self.capacity.mean(dim=(1, 2))

    @property
    def by_layer_and_expert(self) -> Tensor:
        """(L, E), over all evaluations."""
        weights = self.tokens / self.tokens.sum()
        return (self.capacity * weights[:, None, None]).sum(0)

    @property
    def average(self) -> float:
        """C_avg (Eq. 15): the mean over evaluations, layers and experts."""
        return float(self.by_layer_and_expert.mean())


def merged(parts: list[CapacityByTime]) -> CapacityByTime:
    """Of several parts, as if they had been one; equal times are combined."""
    times, place = torch.cat([part.times for part in parts]).unique(return_inverse=True)
    tokens = torch.cat([part.tokens for part in parts])
    selected = torch.cat([part.capacity for part in parts]) * tokens[:, None, None]
    total = tokens.new_zeros(len(times)).index_add(0, place, tokens)
    summed = selected.new_zeros(len(times), *selected.shape[1:]).index_add(0, place, selected)
    return CapacityByTime(times, summed / total[:, None, None], total)


class CapacityMeter:
    """An observer that counts the tokens experts take, without waiting for the device."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._times: list[Tensor] = []
        self._shares_LE: list[Tensor] = []
        self._tokens: list[int] = []

    def __call__(self, forward: Forward) -> None:
        if not forward.routing:
            return
        selected_LES = torch.stack([layer.selected_ES for layer in forward.routing])
        _, E, S = selected_LES.shape
        self._times.append(forward.time)
        self._shares_LE.append(selected_LES.sum(dim=2).double() * E / S)
        self._tokens.append(S)

    def read(self) -> CapacityByTime | None:
        """The evaluations seen since the last reading; None without MoE layers."""
        if not self._times:
            return None
        seen = CapacityByTime(
            torch.stack(self._times).double().cpu(),
            torch.stack(self._shares_LE).cpu(),
            torch.tensor(self._tokens, dtype=torch.float64),
        )
        self._forget()
        return merged([seen])


def activated_parameters(network: DiT, capacity: float | None) -> float:
    """Parameters of the whole network that work on an average token (Eq. 40).

    capacity: C_avg; None for a dense network. An expert counts with the share C / E of tokens that
    it works on; everything else counts whole: shared experts, router, predictor. Eq. 40 says the
    same for MoE in every second block: (1 + C) / (1 + E) of all feed-forwards.
    """
    experts = sum(parameter.numel() for parameter in network.expert_parameters().values())
    experts *= network.topology.expert_parallel
    rest = network.parameter_count() - experts
    if not experts:
        return rest
    assert capacity is not None
    return rest + experts * capacity / network.moe_config.experts


def compute_text(network: DiT, capacity: float) -> str:
    """C_avg and what it means in parameters, in one line."""
    active, total = activated_parameters(network, capacity), network.parameter_count()
    return (
        f"capacity {capacity:.3f}: {active / 1e6:.2f} of {total / 1e6:.2f} million parameters work "
        "on an average token"
    )


def capacity_text(network: DiT, capacity: CapacityByTime) -> str:
    """The same, and below it C at up to eleven times from noise to data."""
    last = len(capacity.times) - 1
    steps = torch.linspace(0, last, min(11, last + 1)).round().long()
    course = ", ".join(
        f"{time:.2f}: {value:.2f}"
        for time, value in zip(capacity.times[steps], capacity.by_time[steps], strict=True)
    )
    return f"{compute_text(network, capacity.average)}\n  from noise (0) to data (1): {course}"
