"""The network of a checkpoint, whole or one rank's part of it, ready for evaluation."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from diffmoe.checkpoints import run_file
from diffmoe.checkpoints.inspect import open_checkpoint
from diffmoe.checkpoints.lifecycle import reading
from diffmoe.checkpoints.pieces import Piece, read_pieces
from diffmoe.checkpoints.run_file import read_run_file, stored_config
from diffmoe.clock import Clock
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.latent_spec import LatentSpec
from diffmoe.models.dit import DiT
from diffmoe.models.lora import merged_state
from diffmoe.models.moe import ROUTING_STATE
from diffmoe.parallel.topology import Topology


class Snapshot(NamedTuple):
    """A checkpoint's network, and what sampling from it needs. class_names: empty if unknown.

    clock: of the training when it was saved.
    """

    network: DiT
    config: Config
    latents: LatentSpec
    class_names: tuple[str, ...]
    clock: Clock


def load_network(
    checkpoint: Path, weights: str = "ema", topology: Topology | None = None
) -> Snapshot:
    """The network in fp32 on the CPU, in evaluation mode; factors of LoRA are merged.

    weights: ema or live. topology: of the ranks that share the experts; each rank then reads its
    own experts and all other tensors. Default: this process reads everything. Raises UserError if
    the checkpoint is damaged or does not hold these weights.
    """
    topology = topology or Topology()
    record = read_run_file(checkpoint)
    config = stored_config(checkpoint, record.config)
    if weights == "ema" and config.training.ema_decay is None and not _holds_ema(checkpoint):
        raise UserError(
            f"{checkpoint} holds no EMA (training.ema_decay is null); take --weights live"
        )
    prefix = {"ema": "ema", "live": "weights"}[weights]
    # Compared first, so that a damaged configuration cannot make us build a huge network.
    with open_checkpoint(checkpoint) as stored:
        missing = [n for n in stored.parameters if f"{prefix}/{n}" not in stored.shapes]
        if missing:
            raise UserError(f"{checkpoint} does not hold {prefix}/{missing[0]}; take another one")
    network = DiT(config.model, config.moe, topology, seed=None, lora=config.lora)
    experts = network.expert_parameters()
    state: dict[str, Tensor] = dict(routing_buffers(network))
    for name, parameter in network.named_parameters():
        flat = parameter.detach().view(-1)
        first, parts = 0, 1
        if name in experts:
            first, parts = topology.expert_rank * len(flat), topology.expert_parallel
        state[f"{prefix}/{name}"] = Piece.of(flat, first, parts * len(flat))
    with reading(checkpoint):
        read_pieces(checkpoint, state, alone=True)
    if config.lora.rank:
        tuned, network = network, DiT(config.model, config.moe, topology, seed=None)
        network.load_state_dict(merged_state(tuned, config.lora.scale))
    latents = LatentSpec.from_manifest(record.latents, checkpoint / run_file.FILE_NAME)
    class_names = tuple(record.latents.get("class_names") or ())
    return Snapshot(network.eval(), config, latents, class_names, record.clock)


def _holds_ema(checkpoint: Path) -> bool:
    """True, say, for a reconstructed average of a run that had no EMA of constant decay."""
    with open_checkpoint(checkpoint) as stored:
        return any(name.startswith("ema/") for name in stored.shapes)


def routing_buffers(network: DiT) -> Iterator[tuple[str, Tensor]]:
    """The state of routing (thresholds, biases), by its names in a checkpoint."""
    for name, buffer in network.state_dict().items():
        if name.endswith(ROUTING_STATE):
            yield f"buffers/{name}", buffer
