"""Any model of ours by its path: a run's folder, a checkpoint, or an exported folder."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffmoe.clock import Clock
from diffmoe.errors import UserError
from diffmoe.export.autoencoder_folder import opened_from
from diffmoe.export.exported import is_exported, load_exported
from diffmoe.export.tensors import cast_parameters, parameter_dtype
from diffmoe.hash_cache import cached_sha256
from diffmoe.models.dit import DiT
from diffmoe.parallel.topology import Topology

if TYPE_CHECKING:
    from diffmoe.checkpoints.network import Snapshot


def locate(path: str | Path) -> Path:
    """The folder that holds the model: an exported one, a checkpoint, or a run's newest.

    Raises UserError where there is none.
    """
    path = Path(path)
    if is_exported(path):
        return path
    from diffmoe.checkpoints.folder import find_complete

    return find_complete(path)


def weights_of(path: Path, asked: str) -> str:
    """Which weights `open_network` takes, ema or live: an exported folder holds one set only."""
    if is_exported(path):
        from diffmoe.export.metadata import read_about

        return read_about(path).calibrated_for
    return asked


def open_network(
    path: str | Path,
    weights: str = "ema",
    topology: Topology | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    verify: bool = True,
) -> "Snapshot":
    """The network, for evaluation, with what sampling from it needs.

    weights: ema or live, of a checkpoint; an exported folder holds one set. topology: of ranks
    that share the experts; each reads its own ones. verify: hold every file against its checksum,
    once per machine; raises UserError where one is damaged. The clock is 0 where it is not known.
    """
    from diffmoe.checkpoints.checksums import find_damage
    from diffmoe.checkpoints.network import Snapshot, load_network

    path, dtype = locate(path), parameter_dtype(dtype)
    if is_exported(path):
        network, about = load_exported(path, device, dtype, topology, verify)
        latents = opened_from(about.latents, path).model_dump(mode="json")
        latents["class_names"] = about.class_names
        clock = about.clock or Clock(samples=0, step=0, skipped=0)
        return Snapshot(network, about.config, latents, clock)
    problems = find_damage(path, digest=cached_sha256) if verify else []
    if problems:
        raise UserError(f"{problems[0]}; take another checkpoint")
    snapshot = load_network(path, weights, topology)
    cast_parameters(snapshot.network, dtype)
    return snapshot._replace(network=snapshot.network.to(device))


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    verify: bool = True,
) -> DiT:
    """A model ready to run: model(x, t, labels).prediction, of a text model model(x, t, text).

    path: an exported folder, a run's folder or a checkpoint (their EMA weights). device: default
    the GPU where there is one. dtype: of the parameters, float32, bfloat16, float16 or float64;
    scores of the router and what the capacity predictor says are in fp32 at least. verify: hold
    the files against their checksums; each is read once per machine, and again when it changed.
    """
    from diffmoe.parallel.device import default_device

    dtype = parameter_dtype(dtype)
    device = device or default_device()
    if is_exported(Path(path)):  # on the way no module of training or checkpoints is loaded
        return load_exported(Path(path), device, dtype, verify=verify)[0]
    return open_network(path, device=device, dtype=dtype, verify=verify).network
