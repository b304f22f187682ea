"""What a checkpoint holds, tensor by tensor, without a process group, a GPU, or the model's memory.

A tensor is known as PREFIX/NAME, such as weights/blocks.0.adaln.weight, and comes whole, whatever
ranks wrote its pieces.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from diffmoe.checkpoints.folder import ABOUT, names, read_about, reading, stored_config
from diffmoe.checkpoints.pieces import IndexReader
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT


def checkpoints(run: str | Path) -> list[Path]:
    """Every checkpoint and EMA-only snapshot of a run's folder, whole or not, oldest first."""
    run = Path(run)
    found = [run / name for kind in ("ema", "step") for name in names(run, kind)]
    if not found:
        what = "holds no checkpoint" if run.is_dir() else "is no folder"
        raise UserError(f"{run} {what}; give a run's output, which holds step-XXXXXXXX")
    return found


class StoredCheckpoint:
    """An open checkpoint; `open_checkpoint` gives one.

    shapes: of every tensor by PREFIX/NAME, global, experts included. pieces: how many it is cut in.
    parameters: the shapes that the network of its configuration has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about = read_about(path)
        self.config = stored_config(path, self.about)
        self.shapes: dict[str, tuple[int, ...]] = {}
        with self._damage_told("its index"):
            self._reader = IndexReader(path)
            self._read_index()

    def _read_index(self) -> None:
        stored = self._reader.read_metadata().state_dict_metadata
        self.pieces = {name: len(item.chunks) for name, item in stored.items()}
        # Parameters are stored flat; the network of the configuration knows their shapes.
        blocks = self.config.model.blocks
        if blocks > len(stored):  # before blocks are made that nothing fills
            raise UserError(
                f"{self.path}: {blocks} blocks of its {ABOUT} with {len(stored)} tensors in all; "
                "the two files are not of one save"
            )
        with torch.device("meta"):
            network = DiT(self.config.model, self.config.moe)
        parameters = {name: tuple(p.shape) for name, p in network.named_parameters()}
        self.parameters = parameters
        for name, item in stored.items():
            _check_whole(self.path, name, item, parameters.get(name.partition("/")[2]))
        for name, item in sorted(stored.items(), key=_by_prefix):
            shape = parameters.get(name.partition("/")[2], tuple(item.size))
            if torch.Size(shape).numel() != item.size.numel():
                raise UserError(
                    f"{self.path}: {name} holds {item.size.numel()} numbers, but the model of its "
                    f"{ABOUT} has the shape {shape} there; the two files are not of one save"
                )
            self.shapes[name] = shape

    @property
    def prefixes(self) -> list[str]:
        """weights, exp_avg, exp_avg_sq, the averages, buffers: those that are there."""
        return list(dict.fromkeys(name.partition("/")[0] for name in self.shapes))

    def read(self, name: str) -> Tensor:
        """One tensor, whole, in its global shape and stored type."""
        if name not in self.shapes:
            raise UserError(
                f"{self.path} holds no {name}; its tensors are {', '.join(self.prefixes)}"
            )
        stored = self._reader.read_metadata().state_dict_metadata[name]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        with self._damage_told(name):
            dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor.view(self.shapes[name])

    @contextlib.contextmanager
    def _damage_told(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        # Pickle, zip and file errors of many kinds; torch derives its own from BaseException.
        except (Exception, dcp.api.CheckpointException) as error:
            if isinstance(error, dcp.api.CheckpointException):
                error = next(iter(error.failures.values()))[0]
            cause = str(error).partition("\n")[0].partition(". ")[0]
            raise UserError(
                f"{self.path} is damaged, reading {what}: {type(error).__name__}: {cause}; "
                f"python tools/checkpoint.py verify {self.path} looks at every file"
            ) from error


def _check_whole(path: Path, name: str, item: Any, shape: tuple[int, ...] | None) -> None:
    """See that the stored pieces hold every element. shape: of the parameter, if it is one."""
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
        raise UserError(f"{path} is damaged: {which} of {name} are in no file; take an older one")


def _by_prefix(entry: tuple[str, Any]) -> tuple[int, str]:
    """Within a prefix the order stays the network's."""
    prefix = entry[0].partition("/")[0]
    order = {"weights": 0, "exp_avg": 1, "exp_avg_sq": 2, "buffers": 4}
    return order.get(prefix, 3), prefix


@contextlib.contextmanager
def open_checkpoint(path: str | Path) -> Iterator[StoredCheckpoint]:
    """A checkpoint for reading; as long as it is open, no retention deletes it."""
    with reading(Path(path)):
        yield StoredCheckpoint(Path(path))


class Difference(NamedTuple):
    """How one tensor differs between two checkpoints.

    problem: why it cannot be compared, or None. differing: elements that are not equal, of `size`.
    largest: absolute. relative: norm of the difference over the norm of the first.
    """

    name: str
    problem: str | None
    size: int = 0
    differing: int = 0
    largest: float = 0.0
    relative: float = 0.0


def compare(first: StoredCheckpoint, second: StoredCheckpoint) -> Iterator[Difference]:
    """Each tensor of either checkpoint, whatever layouts they were saved on. NaN equals NaN."""
    for name in dict.fromkeys([*first.shapes, *second.shapes]):
        shapes = [stored.shapes.get(name) for stored in (first, second)]
        if None in shapes:
            missing = (first, second)[shapes.index(None)]
            yield Difference(name, f"not in {missing.path}")
        elif shapes[0] != shapes[1]:
            yield Difference(name, f"shape {shapes[0]} against {shapes[1]}")
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
