"""A checkpoint's contents, tensor by tensor; needs no process group, no GPU, little memory.

A tensor is named PREFIX/NAME, such as weights/blocks.0.adaln.weight, and is read whole, whichever
ranks wrote its pieces.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from diffmoe.checkpoints.lifecycle import reading
from diffmoe.checkpoints.pieces import IndexReader
from diffmoe.checkpoints.run_file import FILE_NAME, read_run_file, stored_config
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT


class StoredCheckpoint:
    """An open checkpoint; made by `open_checkpoint`.

    record: its run.json. config: the run's settings. shapes: of every tensor by PREFIX/NAME,
    global, experts included. pieces: in how many each one is stored. parameters: the shapes in the
    network of `config`, by NAME.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = read_run_file(path)
        self.config = stored_config(path, self.record.config)
        self.shapes: dict[str, tuple[int, ...]] = {}
        with self._reporting_damage("its index"):
            self._reader = IndexReader(path)
            self._read_index()

    def _read_index(self) -> None:
        stored = self._reader.tensors()
        self.pieces = {name: len(item.chunks) for name, item in stored.items()}
        # Parameters are stored flat; the network of the configuration knows their shapes.
        blocks = self.config.model.blocks
        if blocks > len(stored):  # before building a network of that many blocks
            raise UserError(
                f"{self.path}: its {FILE_NAME} has {blocks} blocks, and its index {len(stored)} "
                "tensors; the two files are not of the same save"
            )
        with torch.device("meta"):
            network = DiT(self.config.model, self.config.moe, lora=self.config.lora)
        parameters = {name: tuple(p.shape) for name, p in network.named_parameters()}
        self.parameters = parameters
        for name, item in stored.items():
            _check_whole(self.path, name, item, parameters.get(name.partition("/")[2]))
        for name, item in sorted(stored.items(), key=_by_prefix):
            shape = parameters.get(name.partition("/")[2], tuple(item.size))
            if torch.Size(shape).numel() != item.size.numel():
                raise UserError(
                    f"{self.path}: {name} has {item.size.numel()} elements, but the shape {shape} "
                    f"in the model of its {FILE_NAME}; the two files are not of the same save"
                )
            self.shapes[name] = shape

    @property
    def prefixes(self) -> list[str]:
        """Those it has of weights, exp_avg, exp_avg_sq, momentum, the averages, buffers."""
        return list(dict.fromkeys(name.partition("/")[0] for name in self.shapes))

    def read(self, name: str) -> Tensor:
        """One tensor, in its global shape and stored type. Raises UserError if it is damaged."""
        if name not in self.shapes:
            raise UserError(
                f"{self.path} holds no {name}; its tensors are {', '.join(self.prefixes)}"
            )
        stored = self._reader.tensors()[name]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        with self._reporting_damage(name):
            dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor.view(self.shapes[name])

    @contextlib.contextmanager
    def _reporting_damage(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        # Pickle, zip and file errors of many kinds; torch derives its own from BaseException.
        except (Exception, dcp.api.CheckpointException) as error:
            cause: BaseException = error
            if isinstance(error, dcp.api.CheckpointException):
                cause = next(iter(error.failures.values()))[0]
            reason = str(cause).partition("\n")[0].partition(". ")[0]
            raise UserError(
                f"{self.path} is damaged, reading {what}: {type(cause).__name__}: {reason}; "
                f"python tools/checkpoint.py verify {self.path} checks every file"
            ) from error


def _check_whole(
    path: Path, name: str, item: TensorStorageMetadata, shape: tuple[int, ...] | None
) -> None:
    """Raise UserError if some elements are in no piece. shape: of the parameter, if it is one."""
    if len(item.size) != 1:
        return
    end = 0
    for start, length in sorted((c.offsets[0], c.sizes[0]) for c in item.chunks):
        if start > end:
            break
        end = max(end, start + length)
    else:
        start = item.size[0]
    if end < start:
        which = f"elements {end} to {start - 1}"
        if ".experts." in name and shape is not None:
            one = torch.Size(shape[1:]).numel()
            which += f" (of experts {end // one} to {(start - 1) // one})"
        raise UserError(
            f"{path} is damaged: {which} of {name} are in no file; take an older checkpoint"
        )


def _by_prefix(entry: tuple[str, TensorStorageMetadata]) -> tuple[int, str]:
    """Sort key: parameters keep the network's order within a prefix."""
    prefix = entry[0].partition("/")[0]
    order = ["weights", "exp_avg", "exp_avg_sq", "momentum", "an average", "buffers"]
    return order.index(prefix if prefix in order else "an average"), prefix


@contextlib.contextmanager
def open_checkpoint(path: str | Path) -> Iterator[StoredCheckpoint]:
    """Open a checkpoint for reading; while it is open, `prune` does not delete it.

    Raises UserError if its run.json or its index is damaged.
    """
    with reading(Path(path)):
        yield StoredCheckpoint(Path(path))


class Difference(NamedTuple):
    """How one tensor differs between two checkpoints.

    problem: why it cannot be compared, or None. differing: how many of its `size` elements differ.
    largest: the largest absolute difference. relative: norm of the difference over that of the
    first.
    """

    name: str
    problem: str | None
    size: int = 0
    differing: int = 0
    largest: float = 0.0
    relative: float = 0.0


def compare(first: StoredCheckpoint, second: StoredCheckpoint) -> Iterator[Difference]:
    """Every tensor of either checkpoint. NaN equals NaN.

    The two may have been saved by different numbers of ranks, with other P and ZeRO stages.
    """
    for name in dict.fromkeys([*first.shapes, *second.shapes]):
        a, b = first.shapes.get(name), second.shapes.get(name)
        if a is None or b is None:
            yield Difference(name, f"not in {(first if a is None else second).path}")
        elif a != b:
            yield Difference(name, f"shape {a} against {b}")
        else:
            yield _difference(name, first.read(name), second.read(name))


def _difference(name: str, a: Tensor, b: Tensor) -> Difference:
    same = (a == b) | (a.isnan() & b.isnan())
    differing = a.numel() - int(same.sum())
    if not differing:
        return Difference(name, None, a.numel())
    change = (a.double() - b.double()).masked_fill(same, 0)
    return Difference(
        name,
        None,
        a.numel(),
        differing,
        float(change.abs().max()),
        float(change.norm() / a.double().norm()),
    )
