"""Which libraries join the ranks: gloo on CPUs, NCCL on GPUs."""

import sys

import torch
import torch.distributed as dist

# gloo beside NCCL: checkpoints gather their plans on the CPU.
ON_GPUS = "cpu:gloo,cuda:nccl"
_SHARED = "cpu:gloo,cuda:gloo"


def choose_backend(device: torch.device, store: dist.Store, world: int) -> str:
    """Of the process group; every rank that has met at the store calls it.

    NCCL refuses two ranks on one GPU. Where there are such, gloo joins all: right, but slow.
    """
    if device.type != "cuda":
        return "gloo"
    # Not by the device's number: a launcher may show each rank one GPU alone, another one each.
    gpu = torch.cuda.get_device_properties(device).uuid
    if not any_shared(store, world, str(gpu)):
        return ON_GPUS
    if store.add("shared GPUs told", 1) == 1:
        message = "several ranks share a GPU: gloo joins them instead of NCCL, which is slow"
        print(message, file=sys.stderr, flush=True)
    return _SHARED


def any_shared(store: dist.Store, world: int, gpu: str) -> bool:
    """Whether any two of the ranks named the same GPU; the same answer on every rank."""
    if store.add(f"GPU {gpu}", 1) > 1:
        store.add("shared GPUs", 1)
    if store.add("GPUs named", 1) == world:
        store.set("all GPUs named", "")
    store.wait(["all GPUs named"])
    return store.add("shared GPUs", 0) > 0
