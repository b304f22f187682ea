"""Tokens to their experts and back: the all-to-alls of an expert-parallel group, with autograd.

Rank r of a group of P owns experts r*e ... (r+1)*e - 1. With P = 1 nothing is sent.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


class Dispatch:
    """Moves rows between the ranks that hold tokens and the ranks that hold experts."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = group.size() if group is not None else 1

    def static(self, rows_EKD: Tensor, experts: Callable[[Tensor, None], Tensor]) -> Tensor:
        """Equal splits: every rank sends K rows to each of the E experts. -> (E, K, D).

        Neither shapes nor splits depend on data, so nothing waits for the device.
        experts: maps (e, P*K, D), None -> (e, P*K, D).
        """
        if self.size == 1:
            return experts(rows_EKD, None)
        E, K, D = rows_EKD.shape
        e, P = E // self.size, self.size
        received = self._exchange(rows_EKD.reshape(E * K, D))
        rows_eND = received.view(P, e, K, D).transpose(0, 1).reshape(e, P * K, D)
        rows_eND = experts(rows_eND, None)
        returned = rows_eND.view(e, P, K, D).transpose(0, 1).reshape(E * K, D)
        return self._exchange(returned).view(E, K, D)

    def ragged(
        self, rows_ND: Tensor, counts_E: Tensor, experts: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Uneven splits: counts_E[i] of the rows go to expert i; zero rows are fine. -> (N, D).

        experts: maps (N', D) grouped by expert, counts_e -> (N', D).
        """
        if self.size == 1:
            return experts(rows_ND, counts_E)
        sent_Pe = counts_E.view(self.size, -1)
        received_Pe = torch.empty_like(sent_Pe)
        dist.all_to_all_single(received_Pe, sent_Pe.contiguous(), group=self.group)
        # The only wait for the device: sizes decide shapes.
        sent, received = torch.stack([sent_Pe, received_Pe]).tolist()
        send, receive = [sum(counts) for counts in sent], [sum(counts) for counts in received]
        rows = self._exchange(rows_ND, receive, send)
        rows = _regroup(rows, received)
        rows = experts(rows, received_Pe.sum(0))
        rows = _regroup(rows, list(zip(*received, strict=True)))
        return self._exchange(rows, send, receive)

    def _exchange(
        self, rows: Tensor, receive: list[int] | None = None, send: list[int] | None = None
    ) -> Tensor:
        assert self.group is not None  # nobody exchanges anything in a group of one
        return all_to_all_single_autograd(rows.contiguous(), receive, send, self.group)


def _regroup(rows: Tensor, counts: Sequence[Sequence[int]]) -> Tensor:
    """Rows lie in chunks ordered (x, y), of counts[x][y] each; lay them in the order (y, x)."""
    X, Y = len(counts), len(counts[0])
    chunks = rows.split([count for row in counts for count in row])
    return torch.cat([chunks[x * Y + y] for y in range(Y) for x in range(X)])
