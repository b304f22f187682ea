"""The K best of a pool of tokens that may be spread over the ranks of a group."""

import torch
import torch.distributed as dist
from torch import Tensor


class TokenPool:
    """Selects in one rank's tokens (no group), or exactly in those of all ranks of a group.

    Over a group the K-th largest value is found by radix: the values become integers that keep
    their order, and a histogram of one byte at a time is summed over the ranks. Four small
    all-reduces (fp32) give the exact value; the bytes sent do not grow with the tokens.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.ranks = group.size() if group is not None else 1

    def kth_largest(self, values_XS: Tensor, k: int) -> Tensor:
        """The k-th largest of each row over the whole pool. -> (X,), no gradient."""
        values_XS = values_XS.detach()
        if self.ranks == 1:
            return values_XS.topk(k, dim=1).values[:, -1]
        return _radix_kth_largest(values_XS, k, self.group)

    def ties(self, values_XS: Tensor, kth_X: Tensor, k: int) -> Tensor:
        """How many of this rank's values equal to the k-th largest belong to the k best. -> (X,).

        Ties fall to the lower rank, then to the lower token, as one process would have them.
        """
        above_X = (values_XS > kth_X[:, None]).sum(dim=1)
        if self.ranks == 1:
            return k - above_X
        equal_X = (values_XS == kth_X[:, None]).sum(dim=1)
        counts_W2X = above_X.new_empty(self.ranks, 2, len(above_X))
        mine_2X = torch.stack([above_X, equal_X])
        dist.all_gather(list(counts_W2X.unbind()), mine_2X, group=self.group)
        lower_ranks_X = counts_W2X[: dist.get_rank(self.group), 1].sum(dim=0)
        missing_X = k - counts_W2X[:, 0].sum(dim=0)
        return (missing_X - lower_ranks_X).clamp(min=0).minimum(equal_X)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the pool's ranks, without gradient; of one rank the tensor itself."""
        if self.ranks > 1:
            tensor = tensor.detach().clone()
            dist.all_reduce(tensor, group=self.group)
        return tensor.detach()


def _radix_kth_largest(values_XS: Tensor, k: int, group: dist.ProcessGroup | None) -> Tensor:
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[values_XS.dtype]
    bits = torch.iinfo(integer).bits
    magnitude = torch.iinfo(integer).max
    # Adding 0.0 turns -0.0 into 0.0. Flipping the magnitude of negatives makes integers sort alike.
    raw = (values_XS + 0.0).view(integer)
    keys_XS = (raw ^ ((raw >> (bits - 1)) & magnitude)).long()
    rows = len(keys_XS)
    prefix_X = torch.zeros(rows, 1, dtype=torch.long, device=keys_XS.device)
    missing_X = torch.full_like(prefix_X, k)
    for shift in range(bits - 8, -1, -8):
        bytes_XS = (keys_XS >> shift) - (prefix_X << 8)
        if shift == bits - 8:
            bytes_XS = bytes_XS + 128  # the highest byte carries the sign
        candidate_XS = (bytes_XS >= 0) & (bytes_XS < 256)
        # Values outside the prefix are counted in a 257th bin, which is cut off.
        histogram = torch.zeros(rows, 257, dtype=torch.long, device=keys_XS.device)
        bins_XS = torch.where(candidate_XS, bytes_XS, 256)
        histogram.scatter_add_(1, bins_XS, torch.ones_like(bins_XS))
        histogram = histogram[:, :256].contiguous()
        dist.all_reduce(histogram, group=group)
        at_least = histogram.flip(1).cumsum(1).flip(1)  # values whose byte is this one or higher
        byte_X = (at_least >= missing_X).sum(1, keepdim=True) - 1
        above_X = at_least.gather(1, byte_X) - histogram.gather(1, byte_X)
        missing_X = missing_X - above_X
        prefix_X = (prefix_X << 8) + byte_X - (128 if shift == bits - 8 else 0)
    kth_X = prefix_X[:, 0].to(integer)
    return (kth_X ^ ((kth_X >> (bits - 1)) & magnitude)).view(values_XS.dtype)
