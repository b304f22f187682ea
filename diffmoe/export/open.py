"""Open any model by its path: a run's folder, a checkpoint, or an exported folder."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffmoe.clock import Clock
from diffmoe.errors import UserError
from diffmoe.export.autoencoder_folder import with_own_autoencoder
from diffmoe.export.exported_model import is_exported, load_exported
from diffmoe.export.tensors import cast_parameters, parameter_dtype
from diffmoe.hash_cache import cached_sha256
from diffmoe.models.dit import DiT
from diffmoe.parallel.topology import Topology

if TYPE_CHECKING:
    from diffmoe.checkpoints.network import Snapshot


def locate(path: str | Path) -> Path:
    """The folder of the model: an exported one, a checkpoint, or a run's newest checkpoint.

    Raises UserError if there is none, or adapters alone.
    """
    from diffmoe.checkpoints.folder import find_complete
    from diffmoe.export.adapters import refuse_adapters

    path = Path(path)
    refuse_adapters(path)
    if is_exported(path):
        return path

    return find_complete(path)


def weights_of(path: Path, requested: str, adapters: Path | None = None) -> str:
    """Which weights `open_network` loads, ema or live: an exported folder has only one set."""
    if adapters is not None:
        from diffmoe.export.adapters import Adapters

        return Adapters(adapters).metadata.model.calibrated_for
    if is_exported(path):
        from diffmoe.export.metadata import read_metadata

        return read_metadata(path).calibrated_for
    return requested


def open_network(
    path: str | Path,
    weights: str = "ema",
    topology: Topology | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    verify: bool = True,
    adapters: str | Path | None = None,
) -> "Snapshot":
    """The network, for evaluation, with what sampling from it needs.

    weights: ema or live, of a checkpoint; an exported folder has one set. topology: of ranks that
    share the experts; each reads only its own. verify: compare every file with its checksum, once
    per machine; raises UserError if one is damaged. adapters: a folder of those that were trained
    on this model; they are merged, which takes the memory of two networks. The clock is 0 if it is
    unknown.
    """
    if adapters is not None:
        from diffmoe.export.adapters import with_adapters

        path, base = locate(path), open_network(path, weights, topology, verify=verify)
        dtype = parameter_dtype(dtype)
        return with_adapters(base, Path(adapters), path, device, dtype, verify)
    from diffmoe.checkpoints.checksums import find_damage
    from diffmoe.checkpoints.network import Snapshot, load_network

    path, dtype = locate(path), parameter_dtype(dtype)
    if is_exported(path):
        network, metadata = load_exported(path, device, dtype, topology, verify)
        latents = with_own_autoencoder(metadata.latents, path)
        clock = metadata.clock or Clock(samples=0, step=0, skipped=0)
        return Snapshot(network, metadata.config, latents, metadata.class_names or (), clock)
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
    adapters: str | Path | None = None,
) -> DiT:
    """A model ready to run: model(x, t, labels).prediction, or model(x, t, text).prediction.

    path: an exported folder, a run's folder or a checkpoint (their EMA weights). device: the GPU
    by default, if there is one. dtype: of the parameters: float32, bfloat16, float16 or float64;
    router scores and the capacity predictor's logits are fp32 at least. verify: compare the files
    with their checksums; each is read once per machine, and again if it has changed. adapters: a
    folder of those that were trained on this model.
    Raises UserError if there is no model, or a file is damaged.

    x (B, C, H, W) are noisy latents, t (B,) their times, labels (B,) classes, of which num_classes
    is the null label; the prediction is (B, C, H, W), or (B, 2C, H, W) with a learned variance.

    >>> import diffmoe, torch
    >>> model = diffmoe.load("exported/mnist", device="cpu")
    >>> x, t, labels = torch.randn(2, 1, 28, 28), torch.rand(2), torch.tensor([3, 10])
    >>> model(x, t, labels).prediction.shape
    torch.Size([2, 1, 28, 28])
    """
    from diffmoe.parallel.device import default_device

    dtype = parameter_dtype(dtype)
    device = device or default_device()
    if adapters is None and is_exported(Path(path)):  # loads no module of training or checkpoints
        return load_exported(Path(path), device, dtype, verify=verify)[0]
    opened = open_network(path, device=device, dtype=dtype, verify=verify, adapters=adapters)
    return opened.network
