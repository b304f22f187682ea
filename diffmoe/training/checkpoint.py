"""Checkpoints that know parameters, not ranks: named global tensors, saved and loaded in pieces.

The files of a checkpoint (folder.py) hold, flattened and in fp32, `weights/NAME`, `exp_avg/NAME`
and `exp_avg_sq/NAME` (or `momentum/NAME`, of Muon's matrices), `ema/NAME` and `buffers/NAME`;
experts stand under their global numbers. Every rank writes the ranges that it owns and reads those
that it will own, so world size, expert parallelism and ZeRO stage may change.
"""

import platform
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe.checkpoints.lifecycle import reading
from diffmoe.checkpoints.network import routing_buffers
from diffmoe.checkpoints.pieces import Piece, read_pieces
from diffmoe.checkpoints.run_file import Origin, RunFile, SavedBy, read_run_file
from diffmoe.clock import Clock
from diffmoe.config import Config
from diffmoe.data.manifest import Manifest
from diffmoe.models.alignment import is_of_projector
from diffmoe.models.dit import DiT
from diffmoe.models.frozen import frozen_names
from diffmoe.parallel.engine import Engine
from diffmoe.parallel.muon import Muon
from diffmoe.parallel.zero import owned_ranges
from diffmoe.training.ema import EMA

# The optimizer's state, by name: of AdamW, and of Muon's matrices.
MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = ("momentum",)


def describe(
    engine: Engine,
    network: DiT,
    config: Config,
    manifest: Manifest,
    clock: Clock,
    origin: Origin | None = None,
) -> RunFile:
    """run.json: all that is no tensor. origin: where --resume PATH began this run (resume.py)."""
    fields = {
        "clock": clock,
        "optimizer_steps": _optimizer_steps(engine),
        "config": config.model_dump(mode="json"),
        # What the latents are, so that samples can be decoded without the data. A location may hold
        # passwords, and is of this machine.
        "latents": manifest.model_dump(mode="json", exclude={"shards", "location"}),
        "shards_sha256": manifest.shards_sha256,
        "saved_by": SavedBy(
            world=network.topology.world,
            torch=str(torch.__version__),
            deepspeed=deepspeed.__version__,
            python=platform.python_version(),
        ),
    }
    return RunFile.model_validate(fields if origin is None else fields | {"origin": origin})


def pieces(engine: Engine, network: DiT, ema: EMA) -> dict[str, Tensor]:
    """Views of all that this rank owns, by the names of the checkpoint."""
    if not engine.optimizer.optimizer.state:  # every step so far was skipped
        _create_optimizer_state(engine, 0)
    state: dict[str, Tensor] = dict(routing_buffers(network))
    optimizer = engine.optimizer.optimizer
    for owned in owned_ranges(engine, network, network.expert_parameters()):
        total = torch.Size(owned.shape).numel()
        tensors = {"weights": owned.master}
        if not is_of_projector(owned.name):  # nothing samples with it
            tensors |= ema.pieces(owned)
        tensors |= owned.state(optimizer)
        for key, tensor in tensors.items():
            state[f"{key}/{owned.name}"] = Piece.of(tensor, owned.start, total)
    return state


def for_sampling(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of `pieces`, what sampling needs: the averages and the buffers."""
    return {name: t for name, t in state.items() if name.startswith(("ema", "buffers/"))}


def load(checkpoint: Path, engine: Engine, network: DiT, ema: EMA) -> Clock:
    """Restore weights, masters, moments, EMA and buffers on any layout. Returns the clock.

    Of a run with another optimizer, or with other frozen parameters, that one's state stays behind:
    this one's begins at zero.
    """
    record = read_run_file(checkpoint)
    same = _same_optimizer(record, engine, network)
    _create_optimizer_state(engine, record.optimizer_steps if same else 0)
    with reading(checkpoint):
        read_pieces(checkpoint, _stored(record, engine, network, ema))
    engine.spread_masters()
    engine.global_steps = record.clock.step
    return record.clock


def all_finite(engine: Engine, ema: EMA) -> bool:
    """Whether the weights and averages of all ranks are finite; every rank calls it."""
    tensors = [*ema.masters, *(part for average in ema.averages.values() for part in average)]
    tensors += [part.master for part in engine.frozen.parts.values()]
    # Offloaded masters are on the CPU, frozen ones where the network is.
    bad = torch.stack([~tensor.isfinite().all().to(engine.device) for tensor in tensors])
    bad = bad.any().double()
    dist.all_reduce(bad)
    return not bad.item()


def restored(checkpoint: Path, engine: Engine, network: DiT, ema: EMA) -> str:
    """One line on what `load` has restored, and from which layout."""
    record = read_run_file(checkpoint)
    state = _stored(record, engine, network, ema)
    clock, parallel = record.clock, record.settings.parallel
    kinds = sorted({name.split("/")[0] for name in state} - {"buffers"})
    buffers = sum(name.startswith("buffers/") for name in state)
    before, now = record.settings.optimizer.type, _optimizer_type(engine)
    anew = f"; the state of {before} stays behind, {now}'s starts at 0"
    if _same_optimizer(record, engine, network):
        anew = ""
    return (
        f"resumed {checkpoint} at {clock.samples} samples (step {clock.step}, "
        f"{clock.skipped} skipped, {record.optimizer_steps} of the optimizer), saved by "
        f"{record.saved_by.world} ranks with expert_parallel={parallel.expert_parallel} "
        f"and zero_stage={parallel.zero_stage}; restored {', '.join(kinds)} of "
        f"{len(list(network.parameters()))} tensors, and {buffers} buffers{anew}"
    )


def _optimizer_type(engine: Engine) -> str:
    return "muon" if isinstance(engine.optimizer.optimizer, Muon) else "adamw"


def _same_optimizer(record: RunFile, engine: Engine, network: DiT) -> bool:
    """Whether a checkpoint's optimizer has the state of this one."""
    same_type = record.settings.optimizer.type == _optimizer_type(engine)
    return same_type and frozen_names(network, record.settings.training) == set(engine.frozen.parts)


def _stored(record: RunFile, engine: Engine, network: DiT, ema: EMA) -> dict[str, Tensor]:
    """Of `pieces`, what is to be read: of another optimizer, all but the state of this one.

    Averages of what is frozen are its weights.
    """
    left_out = () if _same_optimizer(record, engine, network) else (*MOMENTS, *MOMENTUM)
    read = {}
    for name, tensor in pieces(engine, network, ema).items():
        kind, _, parameter = name.partition("/")
        if kind not in left_out and (kind == "weights" or parameter not in engine.frozen.parts):
            read[name] = tensor
    return read


def _optimizer_steps(engine: Engine) -> int:
    states = engine.optimizer.optimizer.state.values()
    return int(next((state["step"] for state in states if "step" in state), 0))


def _create_optimizer_state(engine: Engine, steps: int) -> None:
    """Optimizers make their state at their first step; make the same now, to be filled."""
    optimizer = engine.optimizer.optimizer
    for group in optimizer.param_groups:
        (partition,) = group["params"]
        keys = MOMENTUM if "matrices" in group else MOMENTS
        optimizer.state[partition] = {key: torch.zeros_like(partition) for key in keys}
        if keys == MOMENTS:
            count = torch.tensor(float(steps), device=partition.device)
            optimizer.state[partition]["step"] = count
