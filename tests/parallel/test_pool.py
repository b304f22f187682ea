"""A pool spread over ranks selects what one process would select."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe.models.routing import select_largest, top_k_mask
from diffmoe.parallel.pool import TokenPool
from tests.helpers.ranks import run_ranks


def select(values_XS: Tensor, ks: list[int]) -> list[Tensor]:
    """For each k, this rank's part of the k best of all ranks' equal parts of the columns."""
    mine_XS = values_XS.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].contiguous()
    pool = TokenPool(dist.group.WORLD)
    taken = []
    for k in ks:
        kth_X = pool.kth_largest(mine_XS, k)
        taken.append(select_largest(mine_XS, kth_X, pool.ties(mine_XS, kth_X, k)))
    return taken


def hard_cases(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, 96, generator=generator, dtype=dtype)
    values[1] = values[1].round()  # many ties
    values[2] = 0.25  # nothing but ties
    values[3] = torch.where(values[3] > 0, 0.0, -0.0)
    values[4] = -values[4].abs() * 1e-30
    values[5, ::2] = values[5, 1::2]  # every value on both of two neighbors
    values[6] = values[6] * 1e-42  # subnormal in fp32
    values[7] = 1 + values[7].round() * torch.finfo(dtype).eps  # differ in the last bit
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("world", [2, 4])
def test_wide_pool_equals_one_process_ties_included(world: int, dtype: torch.dtype):
    values = hard_cases(dtype)
    ks = [1, 24, 95, 96]
    for k, *parts in zip(ks, *run_ranks(world, select, values, ks), strict=True):
        taken = torch.cat(parts, dim=1)
        assert torch.equal(taken, top_k_mask(values, k))
        assert (taken.sum(dim=1) == k).all()
