"""Named values in, named sums out, in one collective."""

import torch
import torch.distributed as dist

from diffmoe.benchmarks.collectives import Collectives
from diffmoe.parallel.agree import sum_over_ranks
from tests.helpers.ranks import run_ranks


def summed_on_rank() -> tuple[dict[str, float], dict[str, torch.Tensor], dict[str, int]]:
    rank = dist.get_rank()
    numbers = {"flag": rank == 1, "count": 0.5 + rank}
    tensors = {
        "loss": torch.tensor(0.25 + rank, dtype=torch.double),
        "table": torch.full((2, 3), float(rank)),
        "none": torch.empty(0),
    }
    with Collectives() as counted:
        sums = sum_over_ranks(numbers, tensors, torch.device("cpu"))
    return *sums, dict(counted.calls)


def test_sums_keep_names_and_shapes_in_one_collective():
    for numbers, tensors, calls in run_ranks(2, summed_on_rank):
        assert numbers == {"flag": 1.0, "count": 2.0}
        assert tensors["loss"] == torch.tensor(1.5)
        assert torch.equal(tensors["table"], torch.ones(2, 3, dtype=torch.double))
        assert tensors["none"].shape == (0,)
        assert calls == {"all_reduce": 1}
