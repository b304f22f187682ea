"""Checkpoints that know parameters, not ranks: named global tensors, saved and loaded in pieces.

A checkpoint is a folder step-XXXXXXXX with run.json and the files of torch.distributed.checkpoint,
which hold, flattened and in fp32, `weights/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, `ema/NAME` and
`buffers/NAME`; experts stand under their global numbers. Every rank writes the ranges that it owns
and reads those that it will own, so world size, expert parallelism and ZeRO stage may change.
"""

import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import LoadPlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from diffmoe.config import Config
from diffmoe.data.manifest import Manifest
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.parallel.zero import owned_ranges
from diffmoe.training.ema import EMA

MOMENTS = ("exp_avg", "exp_avg_sq")
_OLDER = "take an older checkpoint by its PATH, step-XXXXXXXX"


class _Piece(Tensor):
    """A 1-D piece of a flattened global tensor, in the protocol of torch.distributed.checkpoint."""

    start: int
    total: int

    @staticmethod
    def of(data: Tensor, start: int, total: int) -> "_Piece":
        piece = data.detach().as_subclass(_Piece)
        piece.start, piece.total = start, total
        return piece

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([self.start]), torch.Size([len(self)]))]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        chunk = self.__create_chunk_list__()[0]
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, torch.Size([self.total])),
            )
        ]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.as_subclass(Tensor)


class _PieceLoadPlanner(dcp.DefaultLoadPlanner):
    """The default planner compares a piece's size with the whole tensor's, and refuses."""

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, value in self.state_dict.items():
            stored = self.metadata.state_dict_metadata.get(name)
            total = value.total if isinstance(value, _Piece) else value.numel()
            if stored is None or stored.size.numel() != total:
                size = "nothing" if stored is None else f"{stored.size.numel()} numbers"
                raise UserError(f"the checkpoint holds {size} for {name}, this model has {total}")
            if isinstance(value, _Piece):
                chunks = value.__create_chunk_list__()
            else:
                zeros = torch.Size([0] * value.dim())
                chunks = [ChunkStorageMetadata(zeros, value.shape)]
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)


class Checkpoints:
    """The checkpoints of one run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(
        self,
        engine: deepspeed.DeepSpeedEngine,
        network: DiT,
        ema: EMA,
        config: Config,
        manifest: Manifest,
        clock: dict[str, int],
    ) -> Path:
        """Write all ranks' pieces under a temporary name, fsync, rename, then move `latest`."""
        final = self.folder / f"step-{clock['step']:08d}"
        torn = self.folder / f".{final.name}.tmp"
        first = network.topology.rank == 0
        if first:
            shutil.rmtree(torn, ignore_errors=True)
            torn.mkdir(parents=True)
        dist.barrier()
        if not engine.optimizer.optimizer.state:  # every step so far was skipped
            _create_optimizer_state(engine, 0)
        writer = dcp.FileSystemWriter(torn, sync_files=True)
        dcp.save(_pieces(engine, network, ema), storage_writer=writer)
        if first:
            about = {
                "clock": clock,
                "optimizer_steps": _optimizer_steps(engine),
                "config": config.model_dump(mode="json"),
                # What the latents are, so that samples can be decoded without the data.
                "latents": manifest.model_dump(mode="json", exclude={"shards"}),
                "saved_by": {
                    "world": network.topology.world,
                    "torch": torch.__version__,
                    "deepspeed": deepspeed.__version__,
                    "python": platform.python_version(),
                },
            }
            write_atomically(torn / "run.json", json.dumps(about, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            torn.rename(final)
            write_atomically(self.folder / "latest", final.name)
        dist.barrier()
        return final

    def newest(self) -> Path | None:
        """The checkpoint that `latest` names; None in a folder without any.

        Raises UserError where something is there but not complete.
        """
        pointer = self.folder / "latest"
        found = self.names()
        if not pointer.exists() and not found:
            return None
        trouble = "no 'latest' file"
        if pointer.exists():
            name = pointer.read_text().strip()
            if name and (self.folder / name / "run.json").exists():
                return self.folder / name
            trouble = f"'latest' names {name!r}, which is not whole"
        others = [other for other in found if (self.folder / other / "run.json").exists()]
        way_out = f"name one with --resume {self.folder / others[-1]}, or " if others else ""
        raise UserError(
            f"{self.folder} holds {', '.join(found) or 'no checkpoint'}, but {trouble}: {way_out}"
            "choose another output"
        )

    def names(self) -> list[str]:
        """All that is there under a checkpoint's name, whole or not, oldest first."""
        return sorted(path.name for path in self.folder.glob("step-*"))


def complete(path: str | Path) -> Path:
    """The folder of a complete checkpoint: itself, or the newest of a run's folder."""
    path = Path(path)
    if (path / "run.json").exists():
        return path
    if (path / "latest").exists():
        return Checkpoints(path).newest()
    raise UserError(
        f"{path} is no complete checkpoint (it has no run.json); give a folder step-XXXXXXXX, "
        "or a run's folder with a 'latest' file"
    )


def read_about(checkpoint: Path) -> dict[str, Any]:
    """run.json: clock, configuration, versions."""
    file = checkpoint / "run.json"
    try:
        about = json.loads(file.read_text())
        missing = {"clock", "optimizer_steps", "config", "latents"} - set(about)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); {_OLDER}") from None
    if missing:
        raise UserError(f"{file} is damaged (it lacks {', '.join(sorted(missing))}); {_OLDER}")
    return about


def load(
    checkpoint: Path, engine: deepspeed.DeepSpeedEngine, network: DiT, ema: EMA
) -> dict[str, int]:
    """Restore weights, masters, moments, EMA and buffers on any layout. Returns the clock."""
    about = read_about(checkpoint)
    _create_optimizer_state(engine, about["optimizer_steps"])
    _read(checkpoint, _pieces(engine, network, ema))
    engine.optimizer.update_lp_params()
    engine.global_steps = about["clock"]["step"]
    return about["clock"]


class Snapshot(NamedTuple):
    """A checkpoint's network, whole, and what is needed to sample from it."""

    network: DiT
    config: Config
    latents: dict[str, Any]
    clock: dict[str, int]


def load_network(checkpoint: Path, weights: str = "ema") -> Snapshot:
    """The whole network in one process, fp32, in evaluation mode. weights: ema or live."""
    about = read_about(checkpoint)
    try:
        config = Config.model_validate(about["config"])
    except ValidationError as error:
        file = checkpoint / "run.json"
        raise UserError(f"{file} holds a configuration of another version: {error}") from None
    network = DiT(config.model, config.moe)
    prefix = {"ema": "ema", "live": "weights"}[weights]
    state = {f"{prefix}/{name}": _whole(p) for name, p in network.named_parameters()}
    state |= dict(_buffers(network))
    _read(checkpoint, state, alone=True)
    return Snapshot(network.eval(), config, about["latents"], about["clock"])


def _pieces(engine: deepspeed.DeepSpeedEngine, network: DiT, ema: EMA) -> dict[str, Tensor]:
    """Views of all that this rank owns, by the names of the checkpoint."""
    state: dict[str, Tensor] = dict(_buffers(network))
    optimizer = engine.optimizer.optimizer
    for owned in owned_ranges(engine, network, network.expert_parameters()):
        total = torch.Size(owned.shape).numel()
        tensors = {"weights": owned.master, "ema": ema.piece(owned)}
        tensors |= {key: owned.state(optimizer, key) for key in MOMENTS}
        for key, tensor in tensors.items():
            state[f"{key}/{owned.name}"] = _Piece.of(tensor, owned.start, total)
    return state


def _buffers(network: DiT) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in network.state_dict().items():
        if name.endswith(".thresholds"):
            yield f"buffers/{name}", buffer


def _whole(parameter: Tensor) -> Tensor:
    flat = parameter.detach().view(-1)
    return _Piece.of(flat, 0, flat.numel())


def _read(checkpoint: Path, state: dict[str, Tensor], alone: bool = False) -> None:
    try:
        dcp.load(
            state,
            storage_reader=dcp.FileSystemReader(checkpoint),
            planner=_PieceLoadPlanner(),
            no_dist=alone,
        )
    except dcp.api.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        for cause in causes:
            if isinstance(cause, UserError):
                raise UserError(f"{checkpoint}: {cause}") from None
        raise UserError(f"{checkpoint} is damaged ({causes[0]}); {_OLDER}") from error


def _optimizer_steps(engine: deepspeed.DeepSpeedEngine) -> int:
    states = engine.optimizer.optimizer.state.values()
    return int(next((state["step"] for state in states if "step" in state), 0))


def _create_optimizer_state(engine: deepspeed.DeepSpeedEngine, steps: int) -> None:
    """AdamW makes its state at its first step; make the same now, to be filled."""
    optimizer = engine.optimizer.optimizer
    for partition in engine.optimizer.single_partition_of_fp32_groups:
        optimizer.state[partition] = {
            "step": torch.tensor(float(steps), device=partition.device),
            **{key: torch.zeros_like(partition) for key in MOMENTS},
        }


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole, on the disk before it gets its name."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
