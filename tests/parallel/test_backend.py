"""Ranks that share a GPU are found, whatever number each of them gives it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from diffmoe.parallel.backend import any_shared, choose_backend
from tests.helpers.devices import GPU


@pytest.mark.parametrize(
    ("gpus", "shared"),
    [
        (["a"], False),
        (["a", "b", "c", "d"], False),
        (["a", "a"], True),
        (["a", "b", "c", "b"], True),
    ],
)
def test_every_rank_learns_whether_any_two_name_one_gpu(gpus: list[str], shared: bool):
    store = dist.HashStore()
    with ThreadPoolExecutor(len(gpus)) as ranks:
        told = list(ranks.map(lambda gpu: any_shared(store, len(gpus), gpu), gpus))
    assert told == [shared] * len(gpus)


def test_on_a_cpu_gloo_joins_and_nobody_is_asked():
    store = dist.HashStore()
    assert choose_backend(torch.device("cpu"), store, 8) == "gloo"
    assert store.num_keys() == 0


@pytest.mark.parametrize("place", [pytest.param("cuda", marks=GPU)])
def test_a_rank_alone_on_its_gpu_takes_nccl_and_two_on_one_take_gloo(place: str):
    gpu, store = torch.device(place, 0), dist.HashStore()
    assert choose_backend(gpu, dist.HashStore(), 1) == "cpu:gloo,cuda:nccl"
    with ThreadPoolExecutor(2) as ranks:
        both = [ranks.submit(choose_backend, gpu, store, 2) for _ in range(2)]
    assert [one.result() for one in both] == ["cpu:gloo,cuda:gloo"] * 2
