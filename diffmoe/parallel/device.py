"""The device of this process among those of one machine."""

import os

import torch

from diffmoe.errors import UserError


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def own_device(device: str) -> torch.device:
    """`cuda` as this rank's GPU, by torchrun's or srun's local rank; anything else as it is."""
    if device != "cuda":
        return torch.device(device)
    if not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU; use --device cpu")
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return torch.device("cuda", local % torch.cuda.device_count())
