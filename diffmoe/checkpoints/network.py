"""The network of a checkpoint, whole or one rank's part of it, ready for evaluation."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from diffmoe.checkpoints.folder import ABOUT, read_about, reading, stored_config
from diffmoe.checkpoints.inspect import open_checkpoint
from diffmoe.checkpoints.pieces import Piece, read
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.latent_spec import LatentSpec
from diffmoe.models.dit import DiT
from diffmoe.parallel.topology import Topology


class Snapshot(NamedTuple):
    """A checkpoint's network, and what sampling from it needs. class_names: empty if unknown."""

    network: DiT
    config: Config
    latents: LatentSpec
    class_names: tuple[str, ...]
    clock: dict[str, int]


def load_network(
    checkpoint: Path, weights: str = "ema", topology: Topology | None = None
) -> Snapshot:
    """The network in fp32 on the CPU, in evaluation mode. weights: ema or live.

    topology: of the ranks that share the experts; each rank reads its own ones and every other
    tensor. Without one, this process reads all.
    """
    topology = topology or Topology()
    about = read_about(checkpoint)
    config = stored_config(checkpoint, about)
    if weights == "ema" and config.training.ema_decay is None and not _holds_ema(checkpoint):
        raise UserError(
            f"{checkpoint} holds no EMA (training.ema_decay is null); take --weights live"
        )
    prefix = {"ema": "ema", "live": "weights"}[weights]
    with open_checkpoint(checkpoint) as stored:  # its files bound what is made below
        missing = [n for n in stored.parameters if f"{prefix}/{n}" not in stored.shapes]
        if missing:
            raise UserError(f"{checkpoint} holds nothing for {prefix}/{missing[0]}; take another")
    network = DiT(config.model, config.moe, topology)
    experts = network.expert_parameters()
    state: dict[str, Tensor] = dict(threshold_buffers(network))
    for name, parameter in network.named_parameters():
        flat = parameter.detach().view(-1)
        first, parts = 0, 1
        if name in experts:
            first, parts = topology.expert_rank * len(flat), topology.expert_parallel
        state[f"{prefix}/{name}"] = Piece.of(flat, first, parts * len(flat))
    with reading(checkpoint):
        read(checkpoint, state, alone=True)
    latents = LatentSpec.from_manifest(about["latents"], checkpoint / ABOUT)
    class_names = tuple(about["latents"].get("class_names") or ())
    return Snapshot(network.eval(), config, latents, class_names, about["clock"])


def _holds_ema(checkpoint: Path) -> bool:
    """A reconstructed average of a run that kept none of constant decay does."""
    with open_checkpoint(checkpoint) as stored:
        return any(name.startswith("ema/") for name in stored.shapes)


def threshold_buffers(network: DiT) -> Iterator[tuple[str, Tensor]]:
    """The capacity thresholds under their names in a checkpoint."""
    for name, buffer in network.state_dict().items():
        if name.endswith(".thresholds"):
            yield f"buffers/{name}", buffer
